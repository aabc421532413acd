"""The tensors of a draft head's checkpoint, in whichever kind of file they lie."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from eagleray.core.errors import ConfigError
from eagleray.models.weight_files import weight_files

FIELD: Final = "speculation.draft_path"  # what the errors of draft checkpoints are about
_TORCH_FILE: Final = "pytorch_model.bin"
_MEDUSA_STEM: Final = "medusa_lm_head"


def read_head_tensors(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(file or folder, tensors by name): safetensors, or ``pytorch_model.bin``. Raises ``ConfigError``."""
    if (folder / _TORCH_FILE).is_file() and not (folder / "model.safetensors").is_file():
        return folder / _TORCH_FILE, _load_torch(folder / _TORCH_FILE)
    tensors: dict[str, torch.Tensor] = {}
    files = weight_files(folder, FIELD)
    for path in files:
        tensors |= _load_safetensors(path)
    return files[0] if len(files) == 1 else folder, tensors


def read_medusa_tensors(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(file, tensors by name): ``medusa_lm_head`` as ``.safetensors`` or ``.pt``. Raises ``ConfigError``."""
    path = folder / f"{_MEDUSA_STEM}.safetensors"
    if path.is_file():
        return path, _load_safetensors(path)
    path = folder / f"{_MEDUSA_STEM}.pt"
    if path.is_file():
        return path, _load_torch(path)
    raise ConfigError(FIELD, str(folder), f"has neither {_MEDUSA_STEM}.safetensors nor {path.name}; fetch it again")


def holds_whole_decoder(folder: Path) -> bool:
    """Whether the weights are those of a model of its own rather than of a head. Raises ``ConfigError``."""
    if (folder / _TORCH_FILE).is_file():
        return False
    names: set[str] = set()
    for path in weight_files(folder, FIELD):
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except SafetensorError as error:
            raise _damaged(path, error) from None
    return "fc.weight" not in names


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from None
    return tensors


def _load_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise _damaged(path, error) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ConfigError(FIELD, str(path), "holds something else than tensors by name")
    return tensors


def _damaged(path: Path, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(FIELD, str(path), f"is damaged, or holds more than tensors ({reason}); fetch it again")
