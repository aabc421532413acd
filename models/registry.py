"""From a checkpoint folder to a ``ModelConfig``: the table of families, and what no family supports."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from eagleray.core.errors import ConfigError
from eagleray.models.families.fields import Fields
from eagleray.models.families.llama import read_llama
from eagleray.models.families.mistral import read_mistral
from eagleray.models.families.qwen2 import read_qwen2
from eagleray.models.families.qwen3 import read_qwen3
from eagleray.models.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of checkpoint."""

    architecture: str  # as ``config.json`` lists it
    read: Callable[[Fields], ModelConfig]


FAMILIES: Final[Mapping[str, Family]] = {  # by model_type
    "llama": Family("LlamaForCausalLM", read_llama),
    "mistral": Family("MistralForCausalLM", read_mistral),
    "qwen2": Family("Qwen2ForCausalLM", read_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", read_qwen3),
}

# Fields that would change the result of a decoder we otherwise know, with the values that do not.
_NEUTRAL_VALUES: Final[Mapping[str, tuple[object, ...]]] = {
    "quantization_config": ({},),
    "compression_config": ({},),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention_multiplier": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "no_rope_layers": ([],),
    "rope_interleaved": (False,),
}


def load_model_config(folder: Path, field: str = "model.path") -> ModelConfig:
    """Read ``config.json``, and the end-of-sequence ids of ``generation_config.json`` where there is one.

    Raises ``ConfigError`` for everything in it that changes the result and that we do not support; where the folder
    itself is wrong, for ``field``.
    """
    fields = read_config_json(folder, field)
    family = _find_family(fields)
    architectures = fields.raw("architectures")
    if architectures is not None and architectures != [family.architecture]:
        way_out = f"is not supported; for {fields.raw('model_type')} it must be [{family.architecture}]"
        raise fields.error("architectures", way_out)
    config = read_decoder_config(fields)
    generation_path = folder / "generation_config.json"
    if not generation_path.exists():
        return config
    eos_token_ids = Fields(_read_json(generation_path, field)).token_ids("eos_token_id")
    return replace(config, eos_token_ids=eos_token_ids or config.eos_token_ids)


def read_config_json(folder: Path, field: str) -> Fields:
    """A checkpoint's ``config.json``. Raises ``ConfigError`` for ``field`` if that is no file with a JSON object."""
    return Fields(_read_json(folder / "config.json", field))


def read_decoder_config(fields: Fields) -> ModelConfig:
    """What a ``config.json``, or the part of one that describes decoder layers, says. Raises ``ConfigError``."""
    refuse_unsupported(fields)
    return _find_family(fields).read(fields)


def refuse_unsupported(fields: Fields) -> None:
    """Raises ``ConfigError`` for what changes the result in any family and is supported in none."""
    for name, neutral in _NEUTRAL_VALUES.items():
        if fields.raw(name) is not None and fields.raw(name) not in neutral:
            raise fields.error(name, "is not supported; use a checkpoint of the plain dense model without it")


def _find_family(fields: Fields) -> Family:
    model_type = fields.raw("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise fields.error("model_type", f"is not supported; supported: {', '.join(FAMILIES)}")
    return family


def _read_json(path: Path, field: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        lacks = f"has no {path.name}" if path.parent.is_dir() else "is no folder"
        raise ConfigError(field, str(path.parent), f"{lacks}; give the folder of a checkpoint") from None
    except (OSError, ValueError) as error:
        raise ConfigError(field, str(path), f"cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(field, str(path), "must hold a JSON object")
    return content
