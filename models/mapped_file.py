"""A file that is read again and again, mapped in huge pages where the system has them.

The page cache keeps a file in pages as large as it was read or written in, for as long as it keeps it. From small ones
a virtual machine reads a third slower (docs/decisions/0024-weights-in-huge-pages.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

WORTH_BYTES: Final = 64 * 2**20  # smaller files are left as they are
_SAMPLE_BYTES: Final = 8 * 2**20
_ENOUGH: Final = 0.5  # of a mapping in huge pages
_MADV_POPULATE_READ: Final = 22  # <linux/mman.h>; Python has no name for it


def map_for_reading(file: BinaryIO) -> mmap.mmap:
    """All of ``file``. A large one that the page cache has in small pages is dropped from there and read from the disk
    once more, unless others have mapped it or a sample of it comes back in small pages again."""
    descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
    if size < WORTH_BYTES:
        return _map(descriptor, size)
    with _alone(descriptor):  # or workers that start together would keep each other's small pages
        mapping = _map(descriptor, size)
        if share_in_huge_pages(mapping) >= _ENOUGH:
            return mapping
        mapping.close()  # the cache lets go of nothing that is mapped
        if _would_be_huge(descriptor):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        mapping = _map(descriptor, size)
        share_in_huge_pages(mapping)  # brings it in, before others look at it
        return mapping


def share_in_huge_pages(mapping: mmap.mmap) -> float:
    """After all of ``mapping`` was brought into memory; 1.0 where the system does not tell."""
    try:
        mapping.madvise(_MADV_POPULATE_READ)
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:  # Linux before 5.14, or without these files
        return 1.0
    start = f"{np.frombuffer(mapping, np.uint8).ctypes.data:x}-"
    area = next((number for number, line in enumerate(lines) if line.startswith(start)), len(lines))
    for line in lines[area + 1 :]:
        if line.startswith("FilePmdMapped:"):
            return int(line.split()[1]) * 1024 / len(mapping)
    return 1.0


@contextlib.contextmanager
def _alone(descriptor: int) -> Iterator[None]:
    """Of those who map this file here. Nobody waits longer than it takes to read the file, as all of them do."""
    with contextlib.suppress(OSError):  # some file systems give this lock to those only who may write
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _map(descriptor: int, size: int) -> mmap.mmap:
    mapping = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
    with contextlib.suppress(OSError, AttributeError):  # then what is not in the cache yet comes as the system likes
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _would_be_huge(descriptor: int) -> bool:
    """Whether what the cache lets go of comes back in huge pages: not from every file system."""
    os.posix_fadvise(descriptor, 0, _SAMPLE_BYTES, os.POSIX_FADV_DONTNEED)
    with _map(descriptor, _SAMPLE_BYTES) as sample:
        return share_in_huge_pages(sample) >= _ENOUGH
