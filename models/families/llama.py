"""Llama 2 and 3, and the many checkpoints published in their format."""

from __future__ import annotations

from eagleray.models.families.dense import read_dense
from eagleray.models.families.fields import Fields
from eagleray.models.model_config import ModelConfig


def read_llama(fields: Fields) -> ModelConfig:
    """Translate ``config.json``. Raises ``ConfigError``."""
    if fields.raw("sliding_window") is not None:
        raise fields.error("sliding_window", "Llama has none; a model with a window is of model_type mistral")
    if set(fields.raw("layer_types") or ()) - {"full_attention"}:
        raise fields.error("layer_types", "all layers of a Llama have full_attention")
    attention_bias = fields.boolean("attention_bias", False)
    return read_dense(
        fields,
        default_max_position_embeddings=2048,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )
