"""A run that can be interrupted at any moment: its state is replaced as a whole, or not at all."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from eagleray.core.errors import ConfigError

FIELD: Final = "--resume"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write beside the old one, and take its place when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state that ``save_checkpoint`` wrote.

    Args:
        settings: of this run, which must be those that the state has under ``settings``.

    Raises:
        ConfigError: there is none, it is damaged, or it is of a run with other settings.
    """
    if not path.exists():
        raise ConfigError(FIELD, str(path), "there is no such checkpoint; leave --resume out to begin anew")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(FIELD, str(path), f"is damaged ({reason}); leave --resume out to begin anew") from None
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            way_out = f"the checkpoint was made with {state['settings'].get(name)!r}; give that, or begin anew"
            raise ConfigError(f"{FIELD}: {name}", value, way_out)
    return state
