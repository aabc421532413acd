"""Qwen 3, dense: RMS norm on every query and key head, and a head size of its own."""

from __future__ import annotations

from eagleray.models.families.dense import read_dense, read_layer_windows
from eagleray.models.families.fields import Fields
from eagleray.models.model_config import ModelConfig


def read_qwen3(fields: Fields) -> ModelConfig:
    """Translate ``config.json``. Raises ``ConfigError``."""
    attention_bias = fields.boolean("attention_bias", False)
    return read_dense(
        fields,
        default_max_position_embeddings=32_768,
        default_head_dim=128,
        sliding_window=read_layer_windows(fields),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
    )
