"""Checkpoints in the layout of the EAGLE authors (SafeAILab/EAGLE): versions 1 and 2, and 3."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Final

from eagleray.core.errors import ConfigError
from eagleray.models.draft_heads.draft_config import EagleConfig, ProjectionNorm
from eagleray.models.draft_heads.tensor_names import DRAFT_TO_TARGET, EMBEDDING, LM_HEAD
from eagleray.models.families.dense import read_dense
from eagleray.models.families.fields import Fields
from eagleray.models.model_config import ModelConfig
from eagleray.models.registry import refuse_unsupported

LAYER_IDS: Final = "eagle_aux_hidden_state_layer_ids"
SECTION: Final = "eagle_config"  # where SpecForge and SGLang have them
_ONLY_IN_VERSION_3: Final = "layers.0.hidden_norm.weight"
_QUERY_BIAS: Final = "layers.0.self_attn.q_proj.bias"


def read_eagle(fields: Fields, tensor_names: Collection[str], target: ModelConfig) -> EagleConfig:
    """Translate ``config.json``, whose ``model_type`` and version nobody fills in reliably: the tensors tell.

    Args:
        tensor_names: of the checkpoint, with ``layers.0`` for ``midlayer``.
        target: that the head is to draft for.

    Raises:
        ConfigError: for what changes the result and is not supported, or does not go with the target.
    """
    refuse_unsupported(fields)
    # Whatever model_type it names, the layers are Llama's, with full attention.
    layers = read_dense(fields, default_max_position_embeddings=2048, qkv_bias=_QUERY_BIAS in tensor_names)
    if _ONLY_IN_VERSION_3 in tensor_names:
        return read_eagle3(fields, layers, _read_layer_ids(fields), tensor_names, target)
    if LM_HEAD in tensor_names:
        raise fields.error("architectures", f"the checkpoint has {LM_HEAD}, which heads of versions 1 and 2 do not")
    return EagleConfig(
        layers=layers,
        target_hidden_size=target.hidden_size,
        capture_layers=(),
        draft_vocab_size=layers.vocab_size,
        has_embedding=EMBEDDING in tensor_names,
        has_lm_head=False,
        fusion_bias=fields.boolean("bias", True),
    )


def read_eagle3(
    fields: Fields,
    layers: ModelConfig,
    layer_ids: tuple[int, ...],
    tensor_names: Collection[str],
    target: ModelConfig,
) -> EagleConfig:
    """What the layouts of version 3 have in common. ``layer_ids``: whose input is captured; none: the authors' choice.

    Raises ``ConfigError``.
    """
    draft_vocab_size = fields.integer("draft_vocab_size", layers.vocab_size)
    if draft_vocab_size != layers.vocab_size and DRAFT_TO_TARGET not in tensor_names:
        way_out = f"differs from vocab_size={layers.vocab_size}, so the checkpoint needs a tensor {DRAFT_TO_TARGET}"
        raise fields.error("draft_vocab_size", way_out)
    return EagleConfig(
        layers=layers,
        target_hidden_size=fields.integer("target_hidden_size", layers.hidden_size),
        capture_layers=_capture_layers(layer_ids, target),
        draft_vocab_size=draft_vocab_size,
        has_embedding=EMBEDDING in tensor_names,
        has_lm_head=LM_HEAD in tensor_names,
        norm_before_residual=fields.boolean("norm_before_residual", False),
        projection_norm=_projection_norm(fields),
        norm_output=fields.boolean("norm_output", False),
    )


def authors_capture_layers(num_layers: int) -> tuple[int, ...]:
    """Whose input a head reads that does not say so: low, middle and high. Rising for targets of six layers or more."""
    return 2, num_layers // 2, num_layers - 3


def read_ids(fields: Fields, name: str) -> tuple[int, ...]:
    """A list of whole numbers; empty if missing. Raises ``ConfigError``."""
    ids = fields.raw(name) or []
    if not isinstance(ids, list) or not all(isinstance(layer, int) and layer >= 0 for layer in ids):
        raise fields.error(name, "must be a list of layers, counted from 0")
    return tuple(ids)


def _read_layer_ids(fields: Fields) -> tuple[int, ...]:
    """At the top they name layers by their input; in ``eagle_config``, as SpecForge writes it, by their output."""
    section = fields.section(SECTION)
    if section is None:
        return read_ids(fields, LAYER_IDS)
    if not section.boolean("use_aux_hidden_state", True):
        raise section.error("use_aux_hidden_state", "a version 3 head without captured layers is not supported")
    return tuple(layer + 1 for layer in read_ids(section, LAYER_IDS))


def _capture_layers(layer_ids: tuple[int, ...], target: ModelConfig) -> tuple[int, ...]:
    num_layers = target.num_layers
    chosen = layer_ids or authors_capture_layers(num_layers)
    is_rising = all(first < second for first, second in pairwise(chosen))
    if not is_rising or not 0 <= chosen[0] <= chosen[-1] < num_layers:
        way_out = f"the target has {num_layers} layers; name some of 0 to {num_layers - 1}, rising, in config.json"
        raise ConfigError(LAYER_IDS, list(chosen), way_out)
    return chosen


def _projection_norm(fields: Fields) -> ProjectionNorm:
    whole, each = fields.boolean("norm_before_fc", False), fields.boolean("fc_norm", False)
    if whole and each:
        raise fields.error("fc_norm", "excludes norm_before_fc; only one of them can be true")
    return "whole" if whole else "each" if each else "none"
