"""Linear layers: weights are packed once, into whatever form multiplies fastest, and then applied at every step.

Packing and computing are two steps, so that what was packed can be kept in a file: the next start skips the packing,
and all processes of a host compute from one copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


class LinearProduct(Protocol):
    """``x @ weight.T + bias + residual`` for one weight."""

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in ``dtype`` or else that of ``x``; ``residual`` is of
        the shape and dtype of the result."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight, and its bias, in the form that a product computes from."""

    tensors: Mapping[str, torch.Tensor]  # contiguous; what they mean is the format's own
    out_features: int
    in_features: int  # padding not counted


class LinearFormat(Protocol):
    """One way to pack weights, and the product that computes from them."""

    @property
    def layout(self) -> str | None:
        """Names the bytes of packed tensors: equal names, interchangeable bytes. None: they mean something in this
        process only."""

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """Of a weight [out_features, in_features] and a bias [out_features] or none, in any floating-point dtype."""

    def bind(self, packed: PackedLinear) -> LinearProduct:
        """The product of packed tensors, which are only read: of ``pack``, or from a file with the same layout."""
