"""Trained heads written down in the layouts that other servers read too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from eagleray.core.errors import ConfigError
from eagleray.models.draft_heads.draft_config import EagleConfig, MedusaConfig
from eagleray.models.draft_heads.eagle_format import LAYER_IDS, SECTION
from eagleray.models.draft_heads.medusa_format import NUM_HEADS
from eagleray.models.draft_heads.tensor_names import DRAFT_TO_TARGET, TARGET_TO_DRAFT


def export_eagle3(folder: Path, config: EagleConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors`` as the EAGLE authors lay out version 3.

    Args:
        tensors: by the names of ``weight_names.eagle_views``, and ``d2t`` if the draft vocabulary is smaller.

    Raises:
        ConfigError: the layout cannot express the configuration.
    """
    _require_expressible(config)
    stored = {name.replace("layers.0.", "midlayer."): tensor.contiguous() for name, tensor in tensors.items()}
    offsets = tensors.get(DRAFT_TO_TARGET)
    if offsets is not None:
        is_drafted = torch.zeros(config.layers.vocab_size, dtype=torch.bool)
        is_drafted[torch.arange(len(offsets)) + offsets] = True
        stored[TARGET_TO_DRAFT] = is_drafted
    stored_dtype = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    _write(folder, _eagle3_json(config, stored_dtype), stored, "model.safetensors")


def export_medusa(folder: Path, config: MedusaConfig, tensors: Mapping[str, torch.Tensor], target_path: str) -> None:
    """Write ``config.json`` and ``medusa_lm_head.safetensors``: the Medusa authors' fields and tensor names, in the
    file that vLLM reads and with what it asks for besides. Their own program reads a ``.pt`` alone.

    Args:
        tensors: by the names of ``weight_names.medusa_views``.
        target_path: name or folder of the model that the heads belong to.
    """
    fields = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        NUM_HEADS: config.num_heads,
        "medusa_num_layers": config.num_layers,
        "medusa_fc_bias": True,  # vLLM drops the blocks' biases without a word where this is missing
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "base_model_name_or_path": target_path,
    }
    _write(folder, fields, tensors, "medusa_lm_head.safetensors")


def _require_expressible(config: EagleConfig) -> None:
    layers = config.layers
    found = {
        "version 1 or 2": not config.is_eagle3,
        "several layers": layers.num_layers != 1,
        "head norms": layers.qk_norm,
        "biases": layers.qkv_bias or layers.output_bias or layers.mlp_bias,
        "rope scaling": layers.rope.scaling is not None,
        "a sliding window": layers.sliding_window != (None,),
    }
    extras = [name for name, is_there in found.items() if is_there]
    if extras:
        raise ConfigError("draft head", ", ".join(extras), "the EAGLE 3 layout has no place for it")


def _eagle3_json(config: EagleConfig, stored_dtype: str) -> dict[str, Any]:
    layers = config.layers
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": layers.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "hidden_size": layers.hidden_size,
        "target_hidden_size": config.target_hidden_size,
        "intermediate_size": layers.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": layers.num_heads,
        "num_key_value_heads": layers.num_kv_heads,
        "head_dim": layers.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": layers.max_position_embeddings,
        "rms_norm_eps": layers.rms_norm_eps,
        "rope_theta": layers.rope.theta,
        "tie_word_embeddings": False,
        "torch_dtype": stored_dtype,
        LAYER_IDS: list(config.capture_layers),
        **_layers_by_output(config.capture_layers),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.projection_norm == "whole",
        "fc_norm": config.projection_norm == "each",
        "norm_output": config.norm_output,
    }


def _layers_by_output(capture_layers: Sequence[int]) -> dict[str, Any]:
    """The same layers once more, for readers of SpecForge's section: by their output, so that the input of the first
    one has no name there."""
    if 0 in capture_layers:
        return {}
    return {SECTION: {LAYER_IDS: [layer - 1 for layer in capture_layers], "use_aux_hidden_state": True}}


def _write(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], file_name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / file_name, save(dict(tensors), {"format": "pt"}))
    _replace(folder / "config.json", (json.dumps(fields, indent=2) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    """As a whole: who trains is interrupted now and then."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)
