"""Pages of libraries' code that only the start has used."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from eagleray.engine.execution.control_groups import PROC, lines_of

_MADV_DONTNEED: Final = 4  # of madvise in Linux's <asm-generic/mman-common.h>
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) [^/]*(/?)")  # its first line, see proc_pid_smaps(5)
# The fields after it: pages that are no more as in the file, and huge ones that never were any file's.
_OWN_PAGES: Final = re.compile(r"(?:Anonymous|Shared_Hugetlb|Private_Hugetlb|Swap): +(\d+) kB")


def give_back_library_pages(proc: Path = PROC) -> None:
    """Let go of every page of the libraries' code in this process: what loading them has touched is most of it, and
    never used again. What is used comes back from the system's file cache, where it stays as long as there is room.

    Only code is let go: it lies where it lies for as long as the process lives, and nothing is lost with it. A library
    some of whose code has been changed in memory, as by a debugger, keeps all of it."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None:
        return
    for first, end in _unchanged_code(lines_of(proc / "self" / "smaps")):
        advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_DONTNEED)


def _unchanged_code(smaps: list[str]) -> Iterator[tuple[int, int]]:
    """(First address, the one after the last) of each mapping of code whose pages are all as in the file."""
    code: tuple[int, int] | None = None
    own_kib: list[int] = []
    for line in smaps:
        if mapping := _MAPPING.match(line):
            is_code = mapping[3] == "r-xp" and mapping[4] == "/"
            code, own_kib = (int(mapping[1], 16), int(mapping[2], 16)) if is_code else None, []
        elif own_pages := _OWN_PAGES.match(line):
            own_kib.append(int(own_pages[1]))
            if code and own_kib == [0, 0, 0, 0]:
                yield code
