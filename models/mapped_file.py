"""A file that is read again and again, mapped in huge pages where the system has them.

The page cache keeps a file in pages as large as it was read or written in, for as long as it keeps it. From small ones
a virtual machine reads a third slower (docs/decisions/0024-weights-in-huge-pages.md).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from eagleray.core.clock import Clock
from eagleray.models.file_lock import locked

WORTH_BYTES: Final = 64 * 2**20  # smaller files are left as they are
_HUGE_BYTES: Final = 2 * 2**20
_SAMPLE_BYTES: Final = 4 * _HUGE_BYTES
_NUM_SAMPLES: Final = 3
_ENOUGH: Final = 0.5  # of a mapping in huge pages
_PIECE_BYTES: Final = 64 * 2**20  # that other threads of this process wait for
_MADV_POPULATE_READ: Final = 22  # <linux/mman.h>; Python has no name for it
_ALONE_DEADLINE_S: Final = 60.0


def map_for_reading(file: BinaryIO, clock: Clock) -> mmap.mmap:
    """All of ``file``. A large one that the page cache has in small pages is dropped from there and read from the disk
    once more, unless others have mapped it or samples of it come back in small pages again."""
    descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
    if size < WORTH_BYTES:
        return _map(descriptor, size)
    with contextlib.ExitStack() as alone:  # or workers that start together would keep each other's small pages
        with contextlib.suppress(OSError):  # without the lock, or after a while, beside them: pages stay as they are
            alone.enter_context(locked(file, clock, clock.now_s() + _ALONE_DEADLINE_S))
        mapping = _map(descriptor, size)
        if share_in_huge_pages(mapping) >= _ENOUGH:
            return mapping
        mapping.close()  # the cache lets go of nothing that is mapped
        if _would_be_huge(descriptor, size):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        mapping = _map(descriptor, size)
        share_in_huge_pages(mapping)  # brings it in, before others look at it
        return mapping


def share_in_huge_pages(mapping: mmap.mmap) -> float:
    """After all of ``mapping`` was brought into memory; 1.0 where the system does not tell."""
    try:
        for piece in range(0, len(mapping), _PIECE_BYTES):
            mapping.madvise(_MADV_POPULATE_READ, piece, min(_PIECE_BYTES, len(mapping) - piece))
        lines = Path("/proc/self/smaps").read_bytes().splitlines()
    except OSError:  # Linux before 5.14, or without these files
        return 1.0
    start = b"%x-" % np.frombuffer(mapping, np.uint8).ctypes.data
    area = next((number for number, line in enumerate(lines) if line.startswith(start)), len(lines))
    for line in lines[area + 1 :]:
        if line.startswith(b"FilePmdMapped:"):
            return int(line.split()[1]) * 1024 / len(mapping)
    return 1.0


def _would_be_huge(descriptor: int, size: int) -> bool:
    """Whether what the cache lets go of comes back in huge pages: not from every file system, nor always."""
    os.fdatasync(descriptor)  # the cache does not let go of what is not on the disk yet
    offsets = [(size - _SAMPLE_BYTES) * number // _NUM_SAMPLES for number in range(_NUM_SAMPLES)]
    return all(_sample_is_huge(descriptor, offset // _HUGE_BYTES * _HUGE_BYTES) for offset in offsets)


def _sample_is_huge(descriptor: int, offset: int) -> bool:
    os.posix_fadvise(descriptor, offset, _SAMPLE_BYTES, os.POSIX_FADV_DONTNEED)
    with _map(descriptor, _SAMPLE_BYTES, offset) as sample:
        return share_in_huge_pages(sample) >= _ENOUGH


def _map(descriptor: int, size: int, offset: int = 0) -> mmap.mmap:
    mapping = mmap.mmap(descriptor, size, prot=mmap.PROT_READ, offset=offset)
    with contextlib.suppress(OSError, AttributeError):  # then what is not in the cache yet comes as the system likes
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
