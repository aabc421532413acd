"""Draft heads as values: everything their networks need to know, whatever format a checkpoint has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from eagleray.core.kv_layout import FeatureGroup, LayerGroup
from eagleray.models.model_config import ModelConfig

DRAFT_GROUP: Final = "draft"  # of a draft network's KV
FEATURE_GROUP: Final = "draft_feature"

ProjectionNorm = Literal["none", "whole", "each"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleConfig:
    """An EAGLE head of version 1, 2 (which differ in how they are used, not in the network) or 3."""

    layers: ModelConfig  # of the head's own layers; vocab_size is the target's
    target_hidden_size: int
    capture_layers: tuple[int, ...]  # whose input the head reads (version 3); none: the target's result (1 and 2)
    draft_vocab_size: int
    has_embedding: bool  # its own rather than the target's
    has_lm_head: bool
    fusion_bias: bool = False  # of the layer that fuses token and feature (1 and 2)
    norm_before_residual: bool = False  # the residual stream starts from the normed feature (3)
    projection_norm: ProjectionNorm = "none"  # over the captured streams, as a whole or each (3)
    norm_output: bool = False  # what is fed back has passed the final norm (3)

    @property
    def is_eagle3(self) -> bool:
        return bool(self.capture_layers)

    @property
    def feature_size(self) -> int:
        """Width of ``Decoder.forward_with_features``' second result, for this head."""
        return self.target_hidden_size * max(1, len(self.capture_layers))

    def kv_layer_group(self, dtype: str) -> LayerGroup:
        """What one block of the head's KV looks like with elements of ``dtype``, a key of ``DTYPE_BYTES``."""
        return self.layers.kv_layer_group(dtype, DRAFT_GROUP)


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """Medusa heads; their width and vocabulary are the target's."""

    num_heads: int
    num_layers: int  # residual blocks of each head
    hidden_size: int
    vocab_size: int


def draft_groups(config: EagleConfig | MedusaConfig | ModelConfig, dtype: str) -> tuple[LayerGroup | FeatureGroup, ...]:
    """What a draft keeps in a block besides the target's KV, in elements of ``dtype``, a key of ``DTYPE_BYTES``."""
    if isinstance(config, EagleConfig):
        return config.kv_layer_group(dtype), FeatureGroup(FEATURE_GROUP, config.layers.hidden_size, dtype)
    return () if isinstance(config, MedusaConfig) else (config.kv_layer_group(dtype, DRAFT_GROUP),)
