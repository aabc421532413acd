"""Mistral: Llama's decoder with one sliding window for all layers."""

from __future__ import annotations

from eagleray.models.families.dense import read_dense
from eagleray.models.families.fields import Fields
from eagleray.models.model_config import ModelConfig


def read_mistral(fields: Fields) -> ModelConfig:
    """Translate ``config.json``. Raises ``ConfigError``."""
    window = fields.optional_integer("sliding_window", 4096)
    uniform = "full_attention" if window is None else "sliding_attention"
    if set(fields.raw("layer_types") or ()) - {uniform}:
        raise fields.error("layer_types", f"with sliding_window={window} every layer of a Mistral has {uniform}")
    return read_dense(
        fields,
        default_max_position_embeddings=131_072,
        sliding_window=(window,) * fields.integer("num_hidden_layers"),
    )
