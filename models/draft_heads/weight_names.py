"""Which tensor of a checkpoint fills which part of a draft head."""

from __future__ import annotations

from typing import Final

import torch

from eagleray.models.draft_heads.eagle import EagleHead, FusedInput
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.tensor_names import EMBEDDING
from eagleray.models.linear import Linear
from eagleray.models.norm import RMSNorm
from eagleray.models.weight_names import layer_views

_MLP_NORM: Final = ("post_attention_layernorm", "mlp_norm")
_EAGLE3_FIRST_NORMS: Final = (
    ("input_layernorm", "input.embedding_norm"),
    ("hidden_norm", "input.feature_norm"),
    _MLP_NORM,
)


def eagle_views(head: EagleHead) -> dict[str, torch.Tensor]:
    """A writable view of the head's memory for every tensor that its checkpoint must have, ``d2t`` aside.

    The views cover every parameter of the head's own exactly once. Layer 0 is ``layers.0``, never ``midlayer``.
    """
    views: dict[str, torch.Tensor] = {}
    if head.embedding is not None:
        views[EMBEDDING] = head.embedding.data
    if head.projection is not None:
        views |= _own_views("fc", head.projection.linear)
        for index, norm in enumerate(head.projection.norms):
            views |= _own_views("input_norm" if head.config.projection_norm == "whole" else f"fc_norm.{index}", norm)
    first = head.first_layer
    if isinstance(first.input, FusedInput):
        views |= _own_views("fc", first.input.fusion)
    views |= layer_views("layers.0.", first, _EAGLE3_FIRST_NORMS if head.config.is_eagle3 else (_MLP_NORM,))
    for index, layer in enumerate(head.further_layers, start=1):
        views |= layer_views(f"layers.{index}.", layer)
    if head.norm is not None:
        views |= _own_views("norm", head.norm)
    if head.lm_head is not None:
        views |= _own_views("lm_head", head.lm_head)
    return views


def medusa_views(heads: MedusaHeads) -> dict[str, torch.Tensor]:
    """The same for Medusa: ``{head}.{block}.linear.weight``, ``.bias``, and ``{head}.{number of blocks}.weight``."""
    views: dict[str, torch.Tensor] = {}
    for h, head in enumerate(heads.heads):
        for index, block in enumerate(head.blocks):
            views |= _own_views(f"{h}.{index}.linear", block)
        views |= _own_views(f"{h}.{len(head.blocks)}", head.lm_head)
    return views


def _own_views(name: str, part: Linear | RMSNorm) -> dict[str, torch.Tensor]:
    views = {f"{name}.weight": part.weight.data}
    if isinstance(part, Linear) and part.bias is not None:
        views[f"{name}.bias"] = part.bias.data
    return views
