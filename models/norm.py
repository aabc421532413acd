"""RMS norm with its weight."""

from __future__ import annotations

import torch
from torch import nn

from eagleray.kernels.norm_rope.api import rms_norm


class RMSNorm(nn.Module):
    """Over the last dimension; the weight is left uninitialised."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)
