"""What a draft's folder holds and whether it goes with the target, from its configuration and its files' headers.

No torch: whoever plans asks too, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eagleray.core.errors import ConfigError
from eagleray.models.draft_heads.draft_config import EagleConfig, MedusaConfig
from eagleray.models.draft_heads.eagle_format import read_eagle
from eagleray.models.draft_heads.medusa_format import NUM_HEADS, read_medusa
from eagleray.models.draft_heads.speculators_format import KIND, read_speculators
from eagleray.models.draft_heads.stored_shapes import FIELD, TORCH_FILE, StoredTensor, head_shapes, medusa_shapes
from eagleray.models.draft_heads.tensor_names import ONLY_IN_TRAINING
from eagleray.models.model_config import ModelConfig
from eagleray.models.registry import load_model_config, read_config_json

DraftMethod = Literal["eagle3", "eagle", "medusa", "draft_model"]


@dataclass(frozen=True, slots=True)
class DraftCheckpoint:
    """An EAGLE head, Medusa heads, or a whole smaller model. Layer 0 of a head is ``layers.0``, never ``midlayer``."""

    config: EagleConfig | MedusaConfig | ModelConfig
    tensors: Mapping[str, StoredTensor]

    @property
    def method(self) -> DraftMethod:
        """That the draft is for."""
        return method_of(self.config)


def method_of(config: EagleConfig | MedusaConfig | ModelConfig) -> DraftMethod:
    """The method that a draft is for."""
    if isinstance(config, EagleConfig):
        return "eagle3" if config.is_eagle3 else "eagle"
    return "medusa" if isinstance(config, MedusaConfig) else "draft_model"


def read_draft(folder: Path, target: ModelConfig) -> DraftCheckpoint:
    """Raises ``ConfigError`` for a format or option that is not supported, or a draft that does not go with the target.

    An embedding counts as the head's own here, even where loading will find that it is a copy of the target's.
    """
    fields = read_config_json(folder, FIELD)
    if fields.raw(NUM_HEADS) is not None:
        heads = medusa_shapes(folder)
        return DraftCheckpoint(read_medusa(fields, heads, target), heads)
    stored = head_shapes(folder)
    is_speculators = fields.raw(KIND) is not None or fields.raw("speculators_config") is not None
    if not is_speculators and not (folder / TORCH_FILE).is_file() and "fc.weight" not in stored:
        model = load_model_config(folder, FIELD)
        _require_vocabulary("config.json: vocab_size", model.vocab_size, target)
        return DraftCheckpoint(model, stored)
    tensors = {name.replace("midlayer.", "layers.0."): stored[name] for name in stored if name not in ONLY_IN_TRAINING}
    config = (read_speculators if is_speculators else read_eagle)(fields, tensors, target)
    _require_fit(config, target)
    return DraftCheckpoint(config, tensors)


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
