"""Checkpoints in the layout of the Medusa authors (FasterDecoding/Medusa)."""

from __future__ import annotations

from typing import Final

from eagleray.models.draft_heads.draft_config import MedusaConfig
from eagleray.models.families.fields import Fields
from eagleray.models.model_config import ModelConfig

NUM_HEADS: Final = "medusa_num_heads"


def read_medusa(fields: Fields, target: ModelConfig) -> MedusaConfig:
    """Translate ``config.json``, which leaves sizes to the target. Raises ``ConfigError``."""
    for name, size in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if fields.integer(name, size) != size:
            raise fields.error(name, f"the target's is {size}; these heads were made for another model")
    return MedusaConfig(
        num_heads=fields.integer(NUM_HEADS),
        num_layers=fields.integer("medusa_num_layers", minimum=0),
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
    )
