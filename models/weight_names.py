"""Which tensor of a Hugging Face checkpoint fills which part of the decoder: a table, and its application."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
HEAD: Final = "lm_head"  # the layer

# Under "model.layers.{i}.": our module, and the checkpoint's names of its fused projections in their order.
_LAYER_LINEARS: Final = (
    ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("attention.output", ("self_attn.o_proj",)),
    ("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.down", ("mlp.down_proj",)),
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


@dataclass(frozen=True, slots=True)
class LinearNames:
    """One linear layer, and the tensors of the checkpoint that it consists of: one per fused projection."""

    name: str  # of the layer, unique in the decoder
    linear: Linear
    weights: tuple[str, ...]
    biases: tuple[str, ...]  # none without bias


def linear_names(decoder: Decoder) -> Iterator[LinearNames]:
    """Every linear layer of the decoder. A tied head consists of the embedding."""
    for index, layer in enumerate(decoder.layers):
        for module, projections in _LAYER_LINEARS:
            linear: Linear = attrgetter(module)(layer)
            names = [f"model.layers.{index}.{projection}" for projection in projections]
            weights = tuple(f"{name}.weight" for name in names)
            biases = () if linear.bias is None else tuple(f"{name}.bias" for name in names)
            yield LinearNames(f"layers.{index}.{module}", linear, weights, biases)
    head = EMBEDDING if decoder.config.tie_word_embeddings else LM_HEAD
    yield LinearNames(HEAD, decoder.lm_head, (head,), ())


def norm_views(decoder: Decoder) -> dict[str, torch.Tensor]:
    """A writable view of every norm's weight, by checkpoint name."""
    views = {"model.norm.weight": decoder.norm.weight.data}
    names = DECODER_LAYER_NORMS + (_HEAD_NORMS if decoder.config.qk_norm else ())
    for index, layer in enumerate(decoder.layers):
        for name, module in names:
            norm: RMSNorm = attrgetter(module)(layer)
            views[f"model.layers.{index}.{name}.weight"] = norm.weight.data
    return views


def checkpoint_views(decoder: Decoder) -> dict[str, torch.Tensor]:
    """A writable view of the decoder's memory for every tensor that its checkpoint must have, by checkpoint name.

    The views cover every parameter exactly once. Tied word embeddings have no ``lm_head.weight``.
    """
    views = {EMBEDDING: decoder.embedding.data, **norm_views(decoder)}
    for names in linear_names(decoder):
        if not names.linear.shares_weight:
            views |= zip(names.weights, (part.detach() for part in names.linear.weight_parts()), strict=True)
        views |= zip(names.biases, (part.detach() for part in names.linear.bias_parts()), strict=True)
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
    for module, projections in _LAYER_LINEARS:
        linear: Linear = attrgetter(module)(layer)
        names = [f"{prefix}{projection}" for projection in projections]
        for name, part in zip(names, linear.weight_parts(), strict=True):
            views[f"{name}.weight"] = part.detach()
        for name, part in zip(names, linear.bias_parts(), strict=False):
            views[f"{name}.bias"] = part.detach()
    return views
