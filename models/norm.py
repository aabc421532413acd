"""RMS norm with its weight."""

from __future__ import annotations

import torch
from torch import nn

from eagleray.kernels.select import Kernels


class RMSNorm:
    """Over the last dimension; the weight is left uninitialised."""

    def __init__(
        self, size: int, eps: float, kernels: Kernels, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps
        self._rms_norm = kernels.rms_norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> the same shape and dtype."""
        return self._rms_norm(x, self.weight, self.eps)
