"""Draft checkpoints with random weights, in every format: for tests that need a draft, not its luck."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import save_file

from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.eagle import EagleHead
from eagleray.models.draft_heads.eagle_format import LAYER_IDS, read_eagle
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.medusa_format import NUM_HEADS, read_medusa
from eagleray.models.draft_heads.speculators_format import KIND, read_speculators
from eagleray.models.draft_heads.tensor_names import DRAFT_TO_TARGET, EMBEDDING, LM_HEAD
from eagleray.models.draft_heads.weight_names import eagle_views, medusa_views
from eagleray.models.families.fields import Fields
from eagleray.models.model_config import ModelConfig
from eagleray.models.random_weights import random_tensor

DraftFormat = Literal["eagle", "eagle3", "speculators", "medusa"]

# What decides how a checkpoint is read, and differs between the formats as published.
_TELLING_NAMES: Final[Mapping[str, frozenset[str]]] = {
    "eagle": frozenset({EMBEDDING}),
    "eagle3": frozenset({"layers.0.hidden_norm.weight", LM_HEAD, DRAFT_TO_TARGET}),
    "speculators": frozenset({EMBEDDING, LM_HEAD, DRAFT_TO_TARGET}),
}


def save_random_draft(folder: Path, draft_format: DraftFormat, target: ModelConfig, seed: int, **changes: Any) -> None:
    """Write a ``config.json`` and float32 weights to go with it, the same for the same seed.

    Args:
        target: that the draft is for; its sizes are the draft's, with half its vocabulary in version 3.
        changes: fields of ``config.json`` to set; for ``speculators`` those of its layers as
            ``transformer_layer_config``, a dictionary.

    Raises ``ConfigError`` for a configuration that is not supported.
    """
    fields = _config_json(draft_format, target)
    layers = fields.get("transformer_layer_config", {}) | changes.pop("transformer_layer_config", {})
    fields |= changes | ({"transformer_layer_config": layers} if layers else {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    if draft_format == "medusa":
        shapes = medusa_views(MedusaHeads(read_medusa(Fields(fields), (), target), torch.float32, "meta"))
        save_file(_random_tensors(shapes, generator), folder / "medusa_lm_head.safetensors")
        return
    read = read_speculators if draft_format == "speculators" else read_eagle
    config = read(Fields(fields), _TELLING_NAMES[draft_format], target)
    tensors = _random_tensors(eagle_views(EagleHead(config, Decoder(target, torch.float32, "meta"))), generator)
    if config.is_eagle3:
        chosen = torch.randperm(target.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
        tensors[DRAFT_TO_TARGET] = chosen - torch.arange(len(chosen))
    if draft_format == "eagle3":
        tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _random_tensors(shapes: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {name: random_tensor(name, view.shape, generator) for name, view in shapes.items()}


def _config_json(draft_format: DraftFormat, target: ModelConfig) -> dict[str, Any]:
    layers = {
        "model_type": "llama",
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "max_position_embeddings": target.max_position_embeddings,
    }
    version_3 = {
        "draft_vocab_size": target.vocab_size // 2,
        LAYER_IDS: sorted({0, target.num_layers // 2, target.num_layers - 1}),  # targets of tests may be too low for 2
    }
    if draft_format == "medusa":
        return {NUM_HEADS: 3, "medusa_num_layers": 1, "base_model_name_or_path": "target"}
    if draft_format == "speculators":
        return version_3 | {KIND: "eagle3", "transformer_layer_config": layers}
    if draft_format == "eagle3":
        return layers | version_3 | {"architectures": ["LlamaForCausalLMEagle3"]}
    return layers | {"architectures": ["LlamaForCausalLM"], "bias": False}
