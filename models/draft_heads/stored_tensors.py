"""The tensors of a draft head's checkpoint, in whichever kind of file they lie."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from eagleray.core.errors import ConfigError
from eagleray.models.draft_heads.stored_shapes import FIELD, TORCH_FILE, damaged, medusa_file
from eagleray.models.weight_files import weight_files


def read_head_tensors(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(file or folder, tensors by name): safetensors, or ``pytorch_model.bin``. Raises ``ConfigError``."""
    if (folder / TORCH_FILE).is_file() and not (folder / "model.safetensors").is_file():
        return folder / TORCH_FILE, _load_torch(folder / TORCH_FILE)
    tensors: dict[str, torch.Tensor] = {}
    files = weight_files(folder, FIELD)
    for path in files:
        tensors |= _load_safetensors(path)
    return files[0] if len(files) == 1 else folder, tensors


def read_medusa_tensors(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(file, tensors by name): ``medusa_lm_head`` as ``.safetensors`` or ``.pt``. Raises ``ConfigError``."""
    path = medusa_file(folder)
    return path, _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise damaged(path, error) from None
    return tensors


def _load_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise damaged(path, error) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ConfigError(FIELD, str(path), "holds something else than tensors by name")
    return tensors
