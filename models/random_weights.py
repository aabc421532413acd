"""A decoder with random weights: for tests and measurements that need a model, not its knowledge."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eagleray.models.decoder import Decoder
from eagleray.models.model_config import ModelConfig
from eagleray.models.registry import load_model_config
from eagleray.models.weight_names import checkpoint_views


def random_model(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The same weights for the same seed. Scaled by fan-in, so that every layer has a say in the logits."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config, dtype, device)
    for name, view in checkpoint_views(decoder).items():
        view.copy_(random_tensor(name, view.shape, generator))
    return decoder


def random_tensor(name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Float32 weights as a layer of that name has them: of a matrix, a bias or a norm."""
    noise = torch.randn(tuple(shape), generator=generator)
    if noise.ndim == 2:
        return noise * math.pow(noise.shape[1], -0.5)
    return noise * 0.1 + (0.0 if name.endswith(".bias") else 1.0)


def save_random_checkpoint(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    """Write ``config`` (the content of a config.json) and weights to go with it, in the dtype that it names, as Hugging
    Face stores them.

    Raises ``ConfigError`` for a configuration that is not supported.
    """
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model_config = load_model_config(folder)
    views = checkpoint_views(random_model(model_config, seed, getattr(torch, model_config.dtype)))
    save_file({name: view.clone() for name, view in views.items()}, folder / "model.safetensors", {"format": "pt"})
