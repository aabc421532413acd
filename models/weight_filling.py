"""Tensors of a checkpoint into the memory of a model, each where and as it belongs, or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import torch

from eagleray.core.errors import ConfigError

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def fill_view(views: Mapping[str, torch.Tensor], name: str, tensor: torch.Tensor, field: str, path: Path) -> None:
    """Copy ``tensor`` of the file at ``path`` into the view of that name, converting the dtype.

    Raises ``ConfigError`` for ``field`` if there is no such view, or one of another shape, or the tensor is quantised.
    """
    view = views.get(name)
    if view is None:
        raise ConfigError(field, str(path), f"tensor {name} has no place in the model that config.json describes")
    if tensor.shape != view.shape:
        shapes = f"{list(tensor.shape)}, config.json implies {list(view.shape)}"
        raise ConfigError(field, str(path), f"tensor {name} has shape {shapes}; the two do not belong together")
    if tensor.dtype not in _DTYPES:
        raise ConfigError(field, str(path), f"tensor {name} is {tensor.dtype}; quantised weights are not supported")
    view.copy_(tensor)


def require_filled(views: Mapping[str, torch.Tensor], filled: Collection[str], field: str, folder: Path) -> None:
    """Raises ``ConfigError`` for ``field`` naming a view that no tensor of the checkpoint in ``folder`` filled."""
    missing = [name for name in views if name not in filled]
    if missing:
        count = f"{len(missing)} tensors, the first of them {missing[0]}" if len(missing) > 1 else missing[0]
        raise ConfigError(field, str(folder), f"the checkpoint lacks {count}; fetch it again, whole")
