"""Which tensor of a Hugging Face checkpoint fills which part of the decoder: a table, and its application."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Final, Protocol

import torch

from eagleray.models.attention import Attention
from eagleray.models.decoder import Decoder
from eagleray.models.linear import Linear
from eagleray.models.mlp import GatedMLP
from eagleray.models.norm import RMSNorm

EMBEDDING: Final = "model.embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"

# Under "model.layers.{i}.": checkpoint name, our module, which of its fused projections.
_LAYER_LINEARS: Final = (
    ("self_attn.q_proj", "attention.qkv", 0),
    ("self_attn.k_proj", "attention.qkv", 1),
    ("self_attn.v_proj", "attention.qkv", 2),
    ("self_attn.o_proj", "attention.output", 0),
    ("mlp.gate_proj", "mlp.gate_up", 0),
    ("mlp.up_proj", "mlp.gate_up", 1),
    ("mlp.down_proj", "mlp.down", 0),
)
DECODER_LAYER_NORMS: Final = (
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "mlp_norm"),
)
_HEAD_NORMS: Final = (
    ("self_attn.q_norm", "attention.query_norm"),
    ("self_attn.k_norm", "attention.key_norm"),
)


class LayerParts(Protocol):
    """A layer that names the parts all kinds have as the decoder's does."""

    attention: Attention
    mlp: GatedMLP


def checkpoint_views(decoder: Decoder) -> dict[str, torch.Tensor]:
    """A writable view of the decoder's memory for every tensor that its checkpoint must have, by checkpoint name.

    The views cover every parameter exactly once. Tied word embeddings have no ``lm_head.weight``.
    """
    views = {EMBEDDING: decoder.embedding.data, "model.norm.weight": decoder.norm.weight.data}
    if not decoder.config.tie_word_embeddings:
        views[LM_HEAD] = decoder.lm_head.weight.data
    for index, layer in enumerate(decoder.layers):
        views |= layer_views(f"model.layers.{index}.", layer)
    return views


def layer_views(
    prefix: str, layer: LayerParts, norms: Sequence[tuple[str, str]] = DECODER_LAYER_NORMS
) -> dict[str, torch.Tensor]:
    """The same for one layer, with ``prefix`` before each name.

    ``norms``: of the layer besides those of the heads, as pairs (name in the checkpoint, our module).
    """
    views = {}
    for name, module in (*norms, *(_HEAD_NORMS if layer.attention.query_norm is not None else ())):
        norm: RMSNorm = attrgetter(module)(layer)
        views[f"{prefix}{name}.weight"] = norm.weight.data
    for name, module, part in _LAYER_LINEARS:
        linear: Linear = attrgetter(module)(layer)
        views[f"{prefix}{name}.weight"] = linear.weight_parts()[part].detach()
        if linear.bias is not None:
            views[f"{prefix}{name}.bias"] = linear.bias_parts()[part].detach()
    return views
