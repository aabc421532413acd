"""The gated MLP."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import silu

from eagleray.models.linear import Linear
from eagleray.models.model_config import ModelConfig


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with gate and up in one projection (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        size, bias = config.intermediate_size, config.mlp_bias
        self.gate_up = Linear(config.hidden_size, (size, size), bias=bias, dtype=dtype, device=device)
        self.down = Linear(size, (config.hidden_size,), bias=bias, dtype=dtype, device=device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        output: torch.Tensor = self.down(silu(gate) * up)
        return output
