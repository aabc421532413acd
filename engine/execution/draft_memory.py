"""What a draft adds to a worker's memory, from its configuration and its files' headers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from eagleray.core.config import SpeculationConfig
from eagleray.core.kv_layout import DTYPE_BYTES, FeatureGroup, LayerGroup
from eagleray.engine.execution.weight_memory import LinearBytes, weight_bytes
from eagleray.engine.speculation.shape import draft_shape, require_fewer_layers, require_method
from eagleray.models.draft_heads.draft_config import EagleConfig, draft_groups
from eagleray.models.draft_heads.read import read_draft
from eagleray.models.draft_heads.stored_shapes import StoredTensor
from eagleray.models.draft_heads.tensor_names import DRAFT_TO_TARGET, EMBEDDING
from eagleray.models.model_config import ModelConfig

_ID_BYTES: Final = 8  # int64


@dataclass(frozen=True)
class DraftNeeds:
    """Of one worker: each loads the draft for itself."""

    weights_bytes: int = 0
    groups: tuple[LayerGroup | FeatureGroup, ...] = ()  # beside the target's in a block
    feature_size: int = 0  # of the target's features that a step keeps for it, elements per token
    max_nodes: int = 0  # guesses of one request that a step verifies

    @classmethod
    def of(cls, config: SpeculationConfig | None, model: ModelConfig, dtype: str, linears: LinearBytes) -> DraftNeeds:
        """For a target ``model`` that computes in ``dtype``. Raises ``ConfigError`` for a draft, or layers that guess,
        that it does not go with."""
        if config is None:
            return cls()
        max_nodes = draft_shape(config).max_nodes
        require_fewer_layers(config, model.num_layers)
        if config.model is None:
            return cls(max_nodes=max_nodes)
        if linears.is_native:
            linears = replace(linears, quantization="w8a8")  # docs/decisions/0014-drafts-in-eight-bits.md
        draft = read_draft(config.folder, model)
        require_method(config, draft.method)
        if isinstance(draft.config, ModelConfig):
            num_bytes = weight_bytes(draft.config, dtype, linears)
        else:
            num_bytes = _head_bytes(draft.tensors, dtype, linears)
        feature_size = draft.config.feature_size if isinstance(draft.config, EagleConfig) else 0
        return cls(num_bytes, draft_groups(draft.config, dtype), feature_size, max_nodes)


def _head_bytes(tensors: Mapping[str, StoredTensor], dtype: str, linears: LinearBytes) -> int:
    """Matrices are linear layers but for the embedding, which like everything small is of ``dtype``."""
    num_bytes = 0.0
    for name, tensor in tensors.items():
        per_element: float = DTYPE_BYTES[dtype]
        if name == DRAFT_TO_TARGET:
            per_element = _ID_BYTES
        elif len(tensor.shape) == 2 and name != EMBEDDING:
            per_element = linears.per_weight(tensor.dtype, dtype)
        num_bytes += per_element * tensor.num_elements
    return int(num_bytes)
