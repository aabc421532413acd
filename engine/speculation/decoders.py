"""Decoders as drafting networks: a smaller model of its own, or the first layers of the target."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.speculation.network import Tokens
from eagleray.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class DecoderNetwork:
    """Implements ``DraftNetwork``: ``num_layers`` of the target, which then exits early (self-speculation, Zhang et
    al., arXiv 2309.08168), or all of a draft model (Leviathan et al., arXiv 2211.17192)."""

    decoder: Decoder
    group: str  # of its KV
    num_layers: int | None = None
    first_slot: int = 0
    target_ids_V: None = None

    def forward(self, tokens: Tokens, kv: KVTensors) -> Tensor:
        return self.decoder.forward(
            tokens.token_ids_N, tokens.slots_N, kv.group(self.group), tokens.plan, self.num_layers
        )

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.compute_logits(hidden)

    def guessed_features(self, hidden: Tensor) -> None:
        return None
