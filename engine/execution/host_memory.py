"""How much memory this process may still take, by machine and containers, and what becomes of what it has freed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_CONTROL_GROUPS: Final = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD: Final = -1  # of mallopt in glibc's <malloc.h>
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_THRESHOLD_BYTES: Final = 32 * 2**20  # that glibc takes for the second
_KEPT_BYTES: Final = 256 * 2**20  # a step's activations: more of them goes back to the system


def available_host_bytes(proc: Path = _PROC, control_groups: Path = _CONTROL_GROUPS) -> int | None:
    """Memory that can be had without swapping: what the kernel estimates, or what the tightest control group around
    this process leaves, whichever is less. None if neither is known."""
    bounds = [*_machine_available_bytes(proc), *_groups_available_bytes(proc, control_groups)]
    return min(bounds, default=None)


def keep_freed_memory() -> None:
    """Let what a step has freed stay with this process for the next one: given back, every page of it would be zeroed
    again. For the whole process, whoever else allocates in it. By the C library's own means: nothing happens where it
    is not glibc."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD_BYTES)
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _machine_available_bytes(proc: Path) -> Iterator[int]:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups_available_bytes(proc: Path, control_groups: Path) -> Iterator[int]:
    """Of the process's own group and all groups above it, of both versions of control groups."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, used = control_groups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = control_groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, which does not exist here: then its own group is the root.
        folders = [root, *(root.joinpath(*parts) for parts in _prefixes(path))]
        for folder in folders:
            yield from _group_available_bytes(folder, limit, used)


def _prefixes(path: str) -> Iterator[tuple[str, ...]]:
    parts = [part for part in path.split("/") if part]
    for count in range(1, len(parts) + 1):
        yield tuple(parts[:count])


def _group_available_bytes(folder: Path, limit: str, used: str) -> Iterator[int]:
    limits, uses = _lines(folder / limit), _lines(folder / used)
    if not limits or not uses or limits[0] == "max":
        return
    # Cached files count as used, and go when memory is needed.
    cached = (int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith("inactive_file "))
    yield max(0, int(limits[0]) - max(0, int(uses[0]) - next(cached, 0)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
