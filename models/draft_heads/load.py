"""From a folder to something that drafts, with its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from eagleray.core.errors import ConfigError
from eagleray.kernels.select import TORCH_KERNELS, Kernels
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.draft_config import EagleConfig, MedusaConfig
from eagleray.models.draft_heads.eagle import EagleHead
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.read import read_draft
from eagleray.models.draft_heads.stored_shapes import FIELD
from eagleray.models.draft_heads.stored_tensors import read_head_tensors, read_medusa_tensors
from eagleray.models.draft_heads.tensor_names import DRAFT_TO_TARGET, EMBEDDING, ONLY_IN_TRAINING
from eagleray.models.draft_heads.weight_names import eagle_views, medusa_views
from eagleray.models.loader import load_model
from eagleray.models.weight_filling import fill_view, require_all


def load_draft(folder: Path, target: Decoder, kernels: Kernels = TORCH_KERNELS) -> EagleHead | MedusaHeads | Decoder:
    """Whatever the folder holds: an EAGLE head, Medusa heads, or a whole smaller model with the target's vocabulary,
    whose KV is the layer group that ``layer_group(dtype, "draft")`` describes; dtype and device as the target.

    Raises:
        ConfigError: a format or option that is not supported, a checkpoint that does not go with the target, or
            tensors that are missing, unexpected, damaged, or of the wrong shape or type.
    """
    config = read_draft(folder, target.config).config
    if isinstance(config, MedusaConfig):
        return _load_medusa(folder, config, target, kernels)
    if isinstance(config, EagleConfig):
        return _load_eagle(folder, config, target, kernels)
    return load_model(folder, config, target.dtype, target.embedding.device, kernels=kernels, field=FIELD)


def _load_medusa(folder: Path, config: MedusaConfig, target: Decoder, kernels: Kernels) -> MedusaHeads:
    path, tensors = read_medusa_tensors(folder)
    heads = MedusaHeads(config, target.dtype, target.embedding.device, kernels)
    _fill(medusa_views(heads), tensors, path)
    heads.prepare()
    return heads


def _load_eagle(folder: Path, config: EagleConfig, target: Decoder, kernels: Kernels) -> EagleHead:
    path, stored = read_head_tensors(folder)
    tensors = {name.replace("midlayer.", "layers.0."): stored[name] for name in stored if name not in ONLY_IN_TRAINING}
    if EMBEDDING in tensors and torch.equal(tensors[EMBEDDING].to(target.embedding), target.embedding):
        del tensors[EMBEDDING]  # a copy: the head reads the target's
        config = replace(config, has_embedding=False)
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
