"""Where files are kept for the next start. No torch."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """Where the XDG Base Directory Specification wants such files."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "eagleray"


def kernel_folder() -> Path:
    """Of compiled libraries."""
    return user_cache_folder() / "kernels"


def can_be_written(folder: Path) -> bool:
    """Or made, where it is not there yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
