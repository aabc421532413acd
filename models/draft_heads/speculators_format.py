"""Checkpoints in the format of the speculators library (vllm-project/speculators), of its kind ``eagle3``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from eagleray.models.draft_heads.draft_config import EagleConfig
from eagleray.models.draft_heads.eagle_format import LAYER_IDS, read_eagle3, read_ids
from eagleray.models.families.fields import Fields
from eagleray.models.model_config import ModelConfig
from eagleray.models.registry import read_decoder_config, refuse_unsupported

KIND: Final = "speculators_model_type"
_LAYER_TYPES: Final = ("llama", "qwen3")


def read_speculators(fields: Fields, tensor_names: Collection[str], target: ModelConfig) -> EagleConfig:
    """Translate ``config.json``; arguments as in ``eagle_format.read_eagle``. Raises ``ConfigError``."""
    if fields.raw(KIND) != "eagle3":
        raise fields.error(KIND, "is not supported; of this library's kinds eagle3 is")
    refuse_unsupported(fields)
    section = fields.section("transformer_layer_config")
    if section is None:
        raise fields.error("transformer_layer_config", "is missing; it describes the head's layers")
    if section.raw("model_type") not in _LAYER_TYPES:
        raise section.error("model_type", f"is not supported here; supported: {', '.join(_LAYER_TYPES)}")
    return read_eagle3(fields, read_decoder_config(section), read_ids(fields, LAYER_IDS), tensor_names, target)
