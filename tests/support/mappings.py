"""What this process has mapped, as Linux counts it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SMAPS = Path("/proc/self/smaps")
needs_smaps = pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux")


def mapped_kib(file: int | Path) -> dict[str, int]:
    """Of all mappings of a file in this process: ``Rss``, ``Pss``, ``FilePmdMapped``, ..."""
    inode = os.stat(file).st_ino
    found: dict[str, int] = {}
    is_ours = False
    for line in SMAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        name, *fields = line.split()
        if not name.endswith(":"):
            is_ours = int(fields[3]) == inode
        elif is_ours and fields[-1] == "kB":
            found[name[:-1]] = found.get(name[:-1], 0) + int(fields[0])
    return found
