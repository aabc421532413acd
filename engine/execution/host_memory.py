"""How much memory this process may still take, by machine and containers, and what becomes of what it has freed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from eagleray.engine.execution.control_groups import CONTROL_GROUPS, PROC, lines_of, own_groups

_M_TRIM_THRESHOLD: Final = -1  # of mallopt in glibc's <malloc.h>
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_THRESHOLD_BYTES: Final = 32 * 2**20  # that glibc takes for the second
_KEPT_BYTES: Final = 256 * 2**20  # a step's activations: more of them goes back to the system


def available_host_bytes(proc: Path = PROC, control_groups: Path = CONTROL_GROUPS) -> int | None:
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


def give_back_freed_memory() -> None:
    """Of the whole process, what steps and the start have freed and ``keep_freed_memory`` has kept: for who will not
    compute for a while. It takes some milliseconds, and the next step some more."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _machine_available_bytes(proc: Path) -> Iterator[int]:
    for line in lines_of(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _groups_available_bytes(proc: Path, control_groups: Path) -> Iterator[int]:
    for folder in own_groups("memory", proc, control_groups):
        yield from _group_available_bytes(folder, "memory.max", "memory.current")
        yield from _group_available_bytes(folder, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _group_available_bytes(folder: Path, limit: str, used: str) -> Iterator[int]:
    limits, uses = lines_of(folder / limit), lines_of(folder / used)
    if not limits or not uses or limits[0] == "max":
        return
    # Cached files count as used, and go when memory is needed.
    cached = (int(line.split()[1]) for line in lines_of(folder / "memory.stat") if line.startswith("inactive_file "))
    yield max(0, int(limits[0]) - max(0, int(uses[0]) - next(cached, 0)))
