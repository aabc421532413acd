"""Linear layers: weights are prepared once, in whatever form multiplies fastest, and then applied at every step."""

from __future__ import annotations

from typing import Protocol

import torch


class LinearProduct(Protocol):
    """``x @ weight.T + bias + residual`` for one weight."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of ``x``; ``residual`` is of the result's shape."""


class PrepareLinear(Protocol):
    """Makes the product of a weight [out_features, in_features] and a bias [out_features] or none. It may keep the
    tensors, or a copy in another layout."""

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearProduct: ...
