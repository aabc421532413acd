"""Host memory for KV blocks: one mapping with every layer group behind the other. No torch.

With ``shared`` it is an anonymous memory file that another process of this host can map. Nothing is left behind
however the process ends, and no size limit of a shared-memory file system applies.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Final

from eagleray.core.errors import ConfigError
from eagleray.core.kv_layout import KVLayout
from eagleray.core.kv_region import SharedMemoryRef, local_host_id
from eagleray.engine.execution.host_memory import available_host_bytes

HEADER_BYTES: Final = 4096  # one page before the blocks: holds the cookie, and keeps them aligned
COOKIE_BYTES: Final = 16
_MADV_POPULATE_WRITE: Final = 23  # <linux/mman.h>; Python has no name for it
_POPULATE_PIECE_BYTES: Final = 64 * 2**20


class KVMemory:
    """``num_blocks`` blocks of ``layout``, zero-filled. Pages of shared memory are provided now, where the system can:
    else the first hand-over into a block would take several times as long. Others come as they are first touched.

    Raises ``ConfigError`` when it does not fit into the memory that is free, or when sharing is not possible here.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, shared: bool = False) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.group_offsets = group_offsets(layout, num_blocks)
        self._block_bytes = tuple(group.block_bytes(layout.block_size_tokens) for group in layout.groups)
        num_bytes = HEADER_BYTES + num_blocks * layout.block_bytes
        check_fits(num_bytes, available_host_bytes())
        self._fd = _create_memory_file(num_bytes) if shared else -1
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._mapping = mmap.mmap(self._fd, num_bytes, flags=flags)
        _ask_for_huge_pages(self._mapping)
        if shared:
            _populate(self._mapping)
        self._view = memoryview(self._mapping)
        self._cookie = os.urandom(COOKIE_BYTES)
        self._view[:COOKIE_BYTES] = self._cookie

    @property
    def buffer(self) -> memoryview:
        """All of it, writable; block b of group g lies at ``group_offsets[g] + b * its bytes``."""
        return self._view

    def block_views(self, block_id: int) -> list[memoryview]:
        """The writable bytes of one block, one view per layer group; nothing is copied."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} of {self.num_blocks}")
        starts = (start + block_id * size for start, size in zip(self.group_offsets, self._block_bytes, strict=True))
        return [self._view[start : start + size] for start, size in zip(starts, self._block_bytes, strict=True)]

    def shared_memory_ref(self) -> SharedMemoryRef | None:
        """How another process of this host finds the memory; None when it is private or closed."""
        if self._fd < 0:
            return None
        return SharedMemoryRef(
            host_id=local_host_id(), pid=os.getpid(), fd=self._fd, num_bytes=len(self._mapping), cookie=self._cookie
        )

    def close(self) -> None:
        """Offer the memory to no new reader. It is freed when the last view of it is gone. May be repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def group_offsets(layout: KVLayout, num_blocks: int) -> tuple[int, ...]:
    """Where the first block of each layer group lies."""
    offsets, offset = [], HEADER_BYTES
    for group in layout.groups:
        offsets.append(offset)
        offset += num_blocks * group.block_bytes(layout.block_size_tokens)
    return tuple(offsets)


def num_blocks_for(layout: KVLayout, kv_memory_bytes: int) -> int:
    """Blocks that fit into ``kv_memory_bytes``. Raises ``ConfigError`` when it is less than two."""
    num_blocks = kv_memory_bytes // layout.block_bytes
    if num_blocks < 2:
        raise ConfigError(
            "engine.kv_memory_bytes",
            kv_memory_bytes,
            f"holds {num_blocks} blocks of {layout.block_bytes} bytes; give it room for at least 2",
        )
    return num_blocks


def check_fits(num_bytes: int, available_bytes: int | None) -> None:
    """Refuse a pool that is larger than the memory that is free; unknown (None) passes."""
    if available_bytes is not None and num_bytes > available_bytes:
        raise ConfigError(
            "engine.kv_memory_bytes",
            num_bytes,
            f"only {available_bytes} bytes of memory are free; lower it, engine.num_blocks or engine.num_host_blocks",
        )


def _create_memory_file(num_bytes: int) -> int:
    if not hasattr(os, "memfd_create"):
        raise ConfigError("transfer.transports", "shared_memory", "needs Linux; leave it out and use tcp")
    fd = os.memfd_create("eagleray-kv", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd


def _ask_for_huge_pages(mapping: mmap.mmap) -> None:
    """A first touch then provides 512 pages at once, and attention, which reads a page here and one there, translates
    few addresses. Systems may refuse, as most do for shared memory."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)


def _populate(mapping: mmap.mmap) -> None:
    """Have all pages provided. In pieces: other threads of this process wait while the system provides one."""
    with contextlib.suppress(OSError):  # Linux before 5.14: they come when they are touched
        for start in range(0, len(mapping), _POPULATE_PIECE_BYTES):
            mapping.madvise(_MADV_POPULATE_WRITE, start, min(_POPULATE_PIECE_BYTES, len(mapping) - start))
