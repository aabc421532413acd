"""Tensors of a checkpoint, each where and as it belongs in a model, or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

import torch

from eagleray.core.errors import ConfigError

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, tensor: torch.Tensor, shape: torch.Size | None, field: str, path: Path) -> None:
    """Raises ``ConfigError`` for ``field`` unless the model has a place of this ``shape`` for a tensor of the file at
    ``path``, in a dtype that we know."""
    if shape is None:
        raise ConfigError(field, str(path), f"tensor {name} has no place in the model that config.json describes")
    if tensor.shape != shape:
        shapes = f"{list(tensor.shape)}, config.json implies {list(shape)}"
        raise ConfigError(field, str(path), f"tensor {name} has shape {shapes}; the two do not belong together")
    if tensor.dtype not in _DTYPES:
        raise ConfigError(field, str(path), f"tensor {name} is {tensor.dtype}; quantised weights are not supported")


def fill_view(views: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor, field: str, path: Path) -> None:
    """Copy a tensor into the view of that name, converting the dtype. Raises as ``check_tensor``."""
    view = views.get(name)
    check_tensor(name, tensor, None if view is None else view.shape, field, path)
    views[name].copy_(tensor)


def require_all(names: Iterable[str], found: Collection[str], field: str, folder: Path) -> None:
    """Raises ``ConfigError`` for ``field`` naming what is not among the tensors of the checkpoint in ``folder``."""
    missing = [name for name in names if name not in found]
    if missing:
        count = f"{len(missing)} tensors, the first of them {missing[0]}" if len(missing) > 1 else missing[0]
        raise ConfigError(field, str(folder), f"the checkpoint lacks {count}; fetch it again, whole")
