"""Which files of a folder hold the weights. No torch: also for those who only look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from eagleray.core.errors import ConfigError

_SINGLE_FILE: Final = "model.safetensors"
_INDEX_FILE: Final = "model.safetensors.index.json"


def weight_files(folder: Path, field: str = "model.path") -> list[Path]:
    """``model.safetensors``, or the files of ``model.safetensors.index.json``; each of them is there.

    Raises ``ConfigError`` for ``field``, naming the one that is missing.
    """
    index = folder / _INDEX_FILE
    names = [_SINGLE_FILE]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(field, str(index), f"cannot be read: {error!r}; fetch it again") from None
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(field, str(folder), f"has no {name}; fetch it, or convert to safetensors")
    return [folder / name for name in names]
