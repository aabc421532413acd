"""The linear layer: what parallelism and quantisation wrap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from eagleray.kernels.linear.api import LinearFormat, LinearProduct
from eagleray.kernels.linear.reference import TorchLinear


class Linear:
    """``x @ weight.T + bias`` for one projection, or for several that read the same input, fused into one product.

    Weights are left uninitialised: a loader fills them through ``weight_parts`` and ``bias_parts``, or brings a product
    that has them in a form of its own (``adopt``).
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],  # per fused projection
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
        weight: nn.Parameter | None = None,  # shared with another layer; [sum(out_features), in_features]
    ) -> None:
        self.out_features = tuple(out_features)
        self.shares_weight = weight is not None
        num_rows = sum(out_features)
        if weight is None:
            weight = nn.Parameter(torch.empty(num_rows, in_features, dtype=dtype, device=device), requires_grad=False)
        self.weight = weight
        self.bias = (
            nn.Parameter(torch.empty(num_rows, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        self._product: LinearProduct = TorchLinear(self.weight, self.bias)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[..., in_features] -> [..., sum(out_features)], ``residual`` of that shape added; in ``dtype``, or that of
        ``x``."""
        return self._product(x, residual, dtype)

    def adopt(self, product: LinearProduct) -> None:
        """Compute by ``product`` from now on. The weight here goes, unless another layer has it too: no more
        ``weight_parts``."""
        self._product = product
        if not self.shares_weight:
            self.weight = nn.Parameter(self.weight.new_empty(0, self.weight.shape[1]), requires_grad=False)

    def prepare(self, linear_format: LinearFormat | None) -> None:
        """Bring the weights, filled by now, into that format; None: leave them."""
        if linear_format is not None:
            self.adopt(linear_format.bind(linear_format.pack(self.weight.detach(), self.bias)))

    def weight_parts(self) -> tuple[torch.Tensor, ...]:
        """A view [out_features[i], in_features] per fused projection."""
        return torch.split(self.weight, list(self.out_features))

    def last(self, num_projections: int) -> Linear:
        """The last of the fused projections by themselves, on the same weights for as long as these are not packed."""
        sizes = self.out_features[-num_projections:]
        rows = slice(sum(self.out_features) - sum(sizes), None)
        weight = nn.Parameter(self.weight.detach()[rows], requires_grad=False)
        part = Linear(weight.shape[1], sizes, bias=False, dtype=weight.dtype, device=weight.device, weight=weight)
        if self.bias is not None:
            part.bias = nn.Parameter(self.bias.detach()[rows], requires_grad=False)
        part._product = TorchLinear(part.weight, part.bias)
        part.shares_weight = False  # the view: nobody else needs it once it is packed
        return part

    def bias_parts(self) -> tuple[torch.Tensor, ...]:
        """A view [out_features[i]] per fused projection; none without bias."""
        return () if self.bias is None else torch.split(self.bias, list(self.out_features))
