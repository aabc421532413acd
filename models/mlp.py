"""The gated MLP."""

from __future__ import annotations

import torch

from eagleray.kernels.select import Kernels
from eagleray.models.linear import Linear
from eagleray.models.model_config import ModelConfig


class GatedMLP:
    """``down(silu(gate(x)) * up(x))`` with gate and up in one projection (Shazeer, arXiv 2002.05202)."""

    def __init__(
        self, config: ModelConfig, kernels: Kernels, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._silu_and_multiply = kernels.silu_and_multiply
        size, bias = config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(config.hidden_size, (size, size), bias=bias, dtype=dtype, device=device)
        self.down = Linear(size, (config.hidden_size,), bias=bias, dtype=dtype, device=device)

    def __call__(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden], added to ``residual``."""
        return self.down(self._silu_and_multiply(self.gate_up(hidden)), residual)

    def linears(self) -> tuple[Linear, ...]:
        return (self.gate_up, self.down)
