"""Linear layers in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import linear


@dataclass(frozen=True, slots=True)
class TorchLinear:
    """Implements ``LinearProduct``; the weight stays as it is, and may be filled later."""

    weight: torch.Tensor  # [out_features, in_features]
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        product = linear(x, self.weight, self.bias)
        return product if residual is None else residual + product
