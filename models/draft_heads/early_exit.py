"""Self-speculation: the target's own first layers draft (Elhoushi et al., arXiv 2404.16710)."""

from __future__ import annotations

import torch

from eagleray.core.errors import ConfigError
from eagleray.kernels.paged_attention.api import AttentionPlan
from eagleray.models.decoder import Decoder


class EarlyExit:
    """The target cut short: its first layers, final norm and output layer.

    It has no weights and no KV of its own. What it writes for a drafted token are the very keys and values that the
    target writes when it verifies that token, in the layers that both run.
    """

    def __init__(self, target: Decoder, num_layers: int) -> None:
        if not 0 < num_layers < target.config.num_layers:
            way_out = (
                f"the target has {target.config.num_layers} layers; leave after 1 to {target.config.num_layers - 1}"
            )
            raise ConfigError("speculation.num_layers", num_layers, way_out)
        self._target, self.num_layers = target, num_layers

    def forward(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, kv: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """[T, hidden]; arguments as in ``Decoder.forward``, ``kv`` being the whole pool of the target."""
        return self._target.forward(input_ids_T, positions_T, kv, plan, self.num_layers)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> float32 [N, V]."""
        return self._target.compute_logits(hidden)
