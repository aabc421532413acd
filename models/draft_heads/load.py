"""From a folder to something that drafts: which format it is in, whether it goes with the target, its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from eagleray.core.errors import ConfigError
from eagleray.kernels.select import TORCH_KERNELS, Kernels
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.draft_config import EagleConfig
from eagleray.models.draft_heads.eagle import EagleHead
from eagleray.models.draft_heads.eagle_format import read_eagle
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.medusa_format import NUM_HEADS, read_medusa
from eagleray.models.draft_heads.speculators_format import KIND, read_speculators
from eagleray.models.draft_heads.stored_tensors import (
    FIELD,
    holds_whole_decoder,
    read_head_tensors,
    read_medusa_tensors,
)
from eagleray.models.draft_heads.weight_names import (
    DRAFT_TO_TARGET,
    EMBEDDING,
    TARGET_TO_DRAFT,
    eagle_views,
    medusa_views,
)
from eagleray.models.families.fields import Fields
from eagleray.models.loader import load_model
from eagleray.models.model_config import ModelConfig
from eagleray.models.registry import load_model_config, read_config_json
from eagleray.models.weight_filling import fill_view, require_all

# Of training only.
_IGNORED: Final = frozenset({TARGET_TO_DRAFT, "verifier_norm.weight", "verifier_lm_head.weight"})


def load_draft(folder: Path, target: Decoder, kernels: Kernels = TORCH_KERNELS) -> EagleHead | MedusaHeads | Decoder:
    """Whatever the folder holds: an EAGLE head, Medusa heads, or a whole smaller model; dtype and device as the target.

    Raises:
        ConfigError: a format or option that is not supported, a checkpoint that does not go with the target, or
            tensors that are missing, unexpected, damaged, or of the wrong shape or type.
    """
    fields = read_config_json(folder, FIELD)
    if fields.raw(NUM_HEADS) is not None:
        return _load_medusa(folder, fields, target, kernels)
    is_speculators = fields.raw(KIND) is not None or fields.raw("speculators_config") is not None
    if not is_speculators and holds_whole_decoder(folder):
        return load_draft_model(folder, target, kernels)
    return _load_eagle(folder, fields, is_speculators, target, kernels)


def load_draft_model(folder: Path, target: Decoder, kernels: Kernels = TORCH_KERNELS) -> Decoder:
    """A whole model that drafts: any that can be served, with the target's vocabulary. Its KV is the layer group that
    ``layer_group(dtype, "draft")`` describes. Raises ``ConfigError``."""
    config = load_model_config(folder, FIELD)
    _require_vocabulary("config.json: vocab_size", config.vocab_size, target.config)
    return load_model(folder, config, target.dtype, target.embedding.device, kernels=kernels, field=FIELD)


def _load_medusa(folder: Path, fields: Fields, target: Decoder, kernels: Kernels) -> MedusaHeads:
    config = read_medusa(fields, target.config)
    path, tensors = read_medusa_tensors(folder)
    heads = MedusaHeads(config, target.dtype, target.embedding.device, kernels)
    _fill(medusa_views(heads), tensors, path)
    heads.prepare()
    return heads


def _load_eagle(folder: Path, fields: Fields, is_speculators: bool, target: Decoder, kernels: Kernels) -> EagleHead:
    path, stored = read_head_tensors(folder)
    tensors = {name.replace("midlayer.", "layers.0."): stored[name] for name in stored if name not in _IGNORED}
    if EMBEDDING in tensors and torch.equal(tensors[EMBEDDING].to(target.embedding), target.embedding):
        del tensors[EMBEDDING]  # a copy: the head reads the target's
    config = (read_speculators if is_speculators else read_eagle)(fields, tensors, target.config)
    _require_fit(config, target.config)
    head = EagleHead(config, target, kernels)
    offsets = tensors.pop(DRAFT_TO_TARGET, None)
    if offsets is not None:
        head.target_ids_D = _target_ids(offsets, config, path).to(target.embedding.device)
    _fill(eagle_views(head), tensors, path)
    head.prepare()
    return head


def _fill(views: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        fill_view(views, name, tensor, FIELD, path)
    require_all(views, tensors, FIELD, path)


def _target_ids(offsets: torch.Tensor, config: EagleConfig, path: Path) -> torch.Tensor:
    """Draft ids to ids of the target; the checkpoint has the differences."""
    size = config.draft_vocab_size
    if offsets.shape != (size,) or offsets.dtype is not torch.int64:
        found = f"{offsets.dtype} {list(offsets.shape)}"
        raise ConfigError(
            FIELD, str(path), f"tensor {DRAFT_TO_TARGET} is {found}; draft_vocab_size implies int64 [{size}]"
        )
    ids = torch.arange(size) + offsets
    if bool((ids < 0).any() or (ids >= config.layers.vocab_size).any()):
        reason = f"tensor {DRAFT_TO_TARGET} leads to ids outside the vocabulary of {config.layers.vocab_size}"
        raise ConfigError(FIELD, str(path), f"{reason}; fetch it again")
    return ids


def _require_fit(config: EagleConfig, target: ModelConfig) -> None:
    _require_vocabulary("config.json: vocab_size", config.layers.vocab_size, target)
    if config.target_hidden_size != target.hidden_size:
        way_out = f"the target's hidden_size is {target.hidden_size}; this head was made for another model"
        raise ConfigError("config.json: target_hidden_size", config.target_hidden_size, way_out)
    shared = [
        part
        for part, has_own in (("embed_tokens.weight", config.has_embedding), ("lm_head.weight", config.has_lm_head))
        if not has_own
    ]
    if shared and config.layers.hidden_size != target.hidden_size:
        way_out = f"the target's is {target.hidden_size}, so its {shared[0]} does not fit and the head needs its own"
        raise ConfigError("config.json: hidden_size", config.layers.hidden_size, way_out)
    if not config.has_lm_head and config.draft_vocab_size != target.vocab_size:
        way_out = f"the target's lm_head has {target.vocab_size} rows and the head has none of its own"
        raise ConfigError("config.json: draft_vocab_size", config.draft_vocab_size, way_out)


def _require_vocabulary(field: str, vocab_size: int, target: ModelConfig) -> None:
    if vocab_size != target.vocab_size:
        way_out = f"the target's is {target.vocab_size}; draft and target must share one vocabulary"
        raise ConfigError(field, vocab_size, way_out)
