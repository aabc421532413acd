"""Models that need no download: the shapes of published ones with random weights, written once as real checkpoints."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from eagleray.models.random_weights import save_random_checkpoint
from eagleray.text.fake import save_byte_tokenizer

SEED: Final = 1
SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {  # by name, the content of config.json
    "qwen3-0.6b": {  # with a smaller vocabulary, so that layers count as they do in larger models
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True, "attention_bias": False,
    },
}  # fmt: skip


def checkpoint_folder(shape: str, cache: Path) -> Path:
    """The checkpoint of a shape, written below ``cache`` unless it is there. Any engine can load it."""
    folder = cache / f"{shape}-seed-{SEED}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=cache))
    try:
        save_random_checkpoint(unfinished, SHAPES[shape], SEED)
        save_byte_tokenizer(unfinished)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
