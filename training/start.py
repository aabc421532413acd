"""Heads before their first lesson: shaped like the target, and starting from what it knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from eagleray.core.errors import ConfigError
from eagleray.models.checkpoint import Checkpoint
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.draft_config import EagleConfig, MedusaConfig
from eagleray.models.draft_heads.eagle import EagleHead
from eagleray.models.draft_heads.eagle_format import authors_capture_layers
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.weight_names import eagle_views, medusa_views
from eagleray.models.model_config import ModelConfig, RopeConfig
from eagleray.models.weight_names import EMBEDDING, LM_HEAD
from eagleray.training.texts import Document

FINAL_NORM: Final = "model.norm.weight"
_WARM_PARTS: Final = ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_SMALL: Final = 0.1  # what is random starts so much smaller than usual beside what is known


def common_tokens(documents: Iterable[Document], vocab_size: int, size: int) -> Tensor:
    """int64 [size], rising: the ids that occur most often in answers; of equal ones the lower."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for document in documents:
        answer = torch.tensor(document.token_ids[document.num_prompt_tokens :], dtype=torch.int64)
        counts += torch.bincount(answer, minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices[:size].sort().values


def default_capture_layers(num_layers: int) -> tuple[int, ...]:
    """Those of the EAGLE authors: low, middle and high. A shallow target has others: as far apart as it allows.

    Raises:
        ConfigError: there are no three layers.
    """
    low, middle, high = authors_capture_layers(num_layers)
    if low < middle < high:
        return low, middle, high
    if num_layers < 3:
        way_out = "EAGLE-3 reads three layers; train --method medusa, or set --capture-layers"
        raise ConfigError("num_hidden_layers", num_layers, way_out)
    return 0, num_layers // 2, num_layers - 1


def eagle3_config(target: ModelConfig, capture_layers: tuple[int, ...], draft_vocab_size: int) -> EagleConfig:
    """One layer shaped like the target's; the layout has no place for what some targets have besides."""
    layers = replace(
        target,
        num_layers=1,
        qk_norm=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        sliding_window=(None,),
        rope=RopeConfig(theta=target.rope.theta),
        tie_word_embeddings=False,
    )
    return EagleConfig(
        layers=layers,
        target_hidden_size=target.hidden_size,
        capture_layers=capture_layers,
        draft_vocab_size=draft_vocab_size,
        has_embedding=False,
        has_lm_head=True,
    )


def warm_eagle3(
    config: EagleConfig, target: ModelConfig, folder: Path, draft_vocabulary_V: Tensor | None, seed: int
) -> dict[str, Tensor]:
    """Weights by name: the target's output rows, its last layer's MLP, and the feature nearest to its end, unchanged.

    Args:
        folder: of the target.
        draft_vocabulary_V: ids of the target's vocabulary, where the head has only some of it.
    """
    known = Checkpoint(folder)
    shapes = eagle_views(EagleHead(config, Decoder(target, torch.float32, "meta")))
    weights = _random(shapes, torch.Generator().manual_seed(seed))
    head = _output_rows(target, known)
    weights["lm_head.weight"] = head if draft_vocabulary_V is None else head[draft_vocabulary_V]
    weights["norm.weight"] = known[FINAL_NORM].float()
    weights["fc.weight"] *= _SMALL
    if config.layers.hidden_size == target.hidden_size:
        weights["fc.weight"][:, -target.hidden_size :] += torch.eye(target.hidden_size)
    weights["layers.0.self_attn.o_proj.weight"] *= _SMALL
    last = f"model.layers.{target.num_layers - 1}"
    for part in _WARM_PARTS:
        weights[f"layers.0.{part}.weight"] = known[f"{last}.{part}.weight"].float()
    return weights


def warm_medusa(config: MedusaConfig, target: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """Weights by name: every head starts as the target's own, as in the paper."""
    head = _output_rows(target, Checkpoint(folder))
    shapes = medusa_views(MedusaHeads(config, torch.float32, "meta"))
    return {
        name: head if name.endswith(f".{config.num_layers}.weight") else torch.zeros(view.shape)
        for name, view in shapes.items()
    }


def _output_rows(target: ModelConfig, known: Checkpoint) -> Tensor:
    return known[EMBEDDING if target.tie_word_embeddings else LM_HEAD].float()


def _random(shapes: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Norms of one, matrices that keep the size of what passes through them."""
    return {
        name: torch.ones(view.shape)
        if view.ndim == 1
        else torch.randn(view.shape, generator=generator) * view.shape[1] ** -0.5
        for name, view in shapes.items()
    }
