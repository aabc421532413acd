"""The folder of packed weights: how much fits into it, and what is taken out of it. No torch: plans ask it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from eagleray.kernels.cache_folder import can_be_written, nearest_existing, user_cache_folder

SUFFIX: Final = ".packed"
PARTIAL_SUFFIX: Final = ".partial"  # of a file that is being written
_SPARED_DISK_BYTES: Final = 2**30  # of a disk that others use too


def packed_weights_folder() -> Path:
    return user_cache_folder() / "packed_weights"


def is_same_file(path: Path, file: BinaryIO) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@dataclass(frozen=True, slots=True)
class PackedFolder:
    """May be missing: it is made when it is needed."""

    path: Path

    def disk_room_bytes(self) -> int:
        """That a new file may take."""
        if not can_be_written(self.path):
            return 0
        try:
            return max(0, shutil.disk_usage(nearest_existing(self.path)).free - _SPARED_DISK_BYTES)
        except OSError:
            return 0

    def file_sizes_bytes(self) -> tuple[int, ...]:
        """Of the whole files."""
        return tuple(stat.st_size for _, stat in self._files())

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """The whole files. Other processes may unlink any of them meanwhile; a folder that cannot be looked into has
        none."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.path.glob(f"*{SUFFIX}"):
                with contextlib.suppress(FileNotFoundError):
                    found.append((path, path.stat()))
        return found

    def remove_abandoned(self) -> None:
        """Unlinks what was begun by processes that have died since: whoever writes a file holds its lock."""
        with contextlib.suppress(OSError):  # what cannot be cleaned stays
            for path in self.path.glob(f"*{PARTIAL_SUFFIX}"):
                # Some file systems give this lock to those only who may write.
                with contextlib.suppress(OSError), path.open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if is_same_file(path, file):  # or it was renamed before we had the lock, and the name is another's
                        path.unlink(missing_ok=True)

    def evict(self, keep: Path, limit_bytes: int) -> None:
        """Unlinks what was used longest ago, so that ``limit_bytes`` are left, ``keep`` among them. Who has mapped it
        keeps it."""
        files = sorted(self._files(), key=lambda file: file[1].st_mtime, reverse=True)
        used_bytes = sum(stat.st_size for path, stat in files if path == keep)
        for path, stat in files:
            if path == keep:
                continue
            used_bytes += stat.st_size
            if used_bytes > limit_bytes:
                with contextlib.suppress(OSError):  # another user's, or it is gone
                    path.unlink()
