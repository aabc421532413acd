"""Kinds of models that we serve, as what their ``config.json`` has other than that of a small Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

FAMILIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
}
ROPE_SCALED: Final[Mapping[str, Any]] = {
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}  # fmt: skip
