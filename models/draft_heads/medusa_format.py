"""Checkpoints in the layout of the Medusa authors (FasterDecoding/Medusa)."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from typing import Final

from eagleray.models.draft_heads.draft_config import MedusaConfig
from eagleray.models.families.fields import Fields
from eagleray.models.model_config import ModelConfig

NUM_HEADS: Final = "medusa_num_heads"


def read_medusa(fields: Fields, tensor_names: Collection[str], target: ModelConfig) -> MedusaConfig:
    """Translate ``config.json``, which leaves sizes to the target, and names fewer heads than there are in those that
    the authors published: the tensors tell. Raises ``ConfigError``.
    """
    for name, size in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if fields.integer(name, size) != size:
            raise fields.error(name, f"the target's is {size}; these heads were made for another model")
    num_layers = fields.integer("medusa_num_layers", minimum=0)
    num_stored = next(head for head in count() if f"{head}.{num_layers}.weight" not in tensor_names)
    return MedusaConfig(
        num_heads=max(fields.integer(NUM_HEADS), num_stored),
        num_layers=num_layers,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
    )
