from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.random_draft import DraftFormat, save_random_draft
from eagleray.models.model_config import ModelConfig
from eagleray.models.random_weights import random_model

TARGET = ModelConfig(
    model_type="llama",
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    num_layers=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position_embeddings=32,
    sliding_window=(None,) * 8,
)

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def target() -> Decoder:
    return random_model(TARGET, seed=1)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a random draft checkpoint, then changes what was written: tensors (None: left out) and fields."""

    def save_draft(
        draft_format: DraftFormat,
        *,
        tensors: dict[str, torch.Tensor | None] | None = None,
        fields: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        save_random_draft(tmp_path, draft_format, TARGET, 2, **changes)
        file = next(tmp_path.glob("*.safetensors"))
        stored = load_file(file) | (tensors or {})
        save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, file)
        config = tmp_path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | (fields or {})))
        return tmp_path

    return save_draft
