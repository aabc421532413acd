"""Where files are kept for the next start. No torch."""

from __future__ import annotations

import os
from pathlib import Path


class CacheFolderUnknown(OSError):
    """This user has no home folder, and XDG_CACHE_HOME is not set."""


def user_cache_folder() -> Path:
    """Where the XDG Base Directory Specification wants such files. Raises ``CacheFolderUnknown``."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "eagleray"
    except RuntimeError:
        raise CacheFolderUnknown("this user has no home folder; set XDG_CACHE_HOME") from None


def kernel_folder() -> Path:
    """Of compiled libraries."""
    return user_cache_folder() / "kernels"


def is_there(path: Path) -> bool:
    """As far as this user may know: ``Path.exists`` raises an error where a folder above cannot be looked into."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def nearest_existing(folder: Path) -> Path:
    """The folder, or the closest of those above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if is_there(path))


def can_be_written(folder: Path) -> bool:
    """Or made, where it is not there yet."""
    try:
        existing = nearest_existing(folder)
        return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except OSError:  # a relative path, and the working folder is gone
        return False
