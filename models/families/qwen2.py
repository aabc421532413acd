"""Qwen 2 and 2.5: biases on query, key and value; a window in the upper layers of some."""

from __future__ import annotations

from eagleray.models.families.dense import read_dense, read_layer_windows
from eagleray.models.families.fields import Fields
from eagleray.models.model_config import ModelConfig


def read_qwen2(fields: Fields) -> ModelConfig:
    """Translate ``config.json``. Raises ``ConfigError``."""
    return read_dense(
        fields,
        default_max_position_embeddings=32_768,
        sliding_window=read_layer_windows(fields),
        qkv_bias=True,
    )
