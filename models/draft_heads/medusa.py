"""Medusa: heads that each guess a token further ahead from the target's last hidden state (Cai et al., arXiv
2401.10774)."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from eagleray.kernels.select import TORCH_KERNELS, Kernels
from eagleray.models.draft_heads.draft_config import MedusaConfig
from eagleray.models.linear import Linear


class MedusaHead:
    """Residual blocks ``x + silu(linear(x))``, then an output layer."""

    def __init__(self, config: MedusaConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        size = config.hidden_size
        self.blocks = [Linear(size, (size,), bias=True, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.lm_head = Linear(size, (config.vocab_size,), bias=False, dtype=dtype, device=device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> [N, V]."""
        for block in self.blocks:
            hidden = hidden + silu(block(hidden))
        return self.lm_head(hidden)


class MedusaHeads:
    """All heads of a checkpoint. They have no KV. Weights are left uninitialised; see ``load.load_draft``."""

    def __init__(
        self,
        config: MedusaConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kernels: Kernels = TORCH_KERNELS,
    ) -> None:
        self.config = config
        self._kernels = kernels
        self.heads = [MedusaHead(config, dtype=dtype, device=device) for _ in range(config.num_heads)]

    def prepare(self) -> None:
        """To be called when the weights are filled: linear layers bring theirs into the form that computes fastest."""
        for head in self.heads:
            for linear in (*head.blocks, head.lm_head):
                linear.prepare(self._kernels.linear_format)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Guess ahead of the token that the target itself chooses.

        Args:
            hidden: [N, hidden], the target's, after its final norm, of tokens at positions t.

        Returns:
            float32 [N, num_heads, V]; head h is for position t + 2 + h.
        """
        return torch.stack([head(hidden).float() for head in self.heads], dim=1)
