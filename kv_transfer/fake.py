"""Pools of blocks without an engine, and callbacks to wait for: for tests of whatever moves blocks."""

from __future__ import annotations

import mmap
import os
import threading
from typing import Final, Generic, TypeVar

from eagleray.core.kv_layout import KVLayout
from eagleray.core.kv_region import KVRegion, SharedMemoryRef, local_host_id

T = TypeVar("T")

_HEADER_BYTES: Final = 4096  # a page before the blocks, for the cookie
_COOKIE_BYTES: Final = 16


class MemoryBlockStore:
    """``num_blocks`` zero-filled blocks; with ``shared`` in a memory file that other processes of this host can map."""

    def __init__(self, layout: KVLayout, num_blocks: int, shared: bool = False) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self._sizes = [group.block_bytes(layout.block_size_tokens) for group in layout.groups]
        self.group_offsets = tuple(_HEADER_BYTES + num_blocks * sum(self._sizes[:n]) for n in range(len(self._sizes)))
        num_bytes = _HEADER_BYTES + num_blocks * layout.block_bytes
        self._fd = -1
        if shared:
            self._fd = os.memfd_create("eagleray-fake-kv", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, num_bytes)
        self._memory = memoryview(mmap.mmap(self._fd, num_bytes))
        self._memory[:_COOKIE_BYTES] = os.urandom(_COOKIE_BYTES)

    def block_views(self, block_id: int) -> list[memoryview]:
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} of {self.num_blocks}")
        starts = [offset + block_id * size for offset, size in zip(self.group_offsets, self._sizes, strict=True)]
        return [self._memory[start : start + size] for start, size in zip(starts, self._sizes, strict=True)]

    def fill(self, block_id: int, text: str) -> None:
        """Write bytes that depend on ``text`` and on the layer group."""
        for group, view in enumerate(self.block_views(block_id)):
            pattern = f"{text}/{group};".encode()
            view[:] = (pattern * (view.nbytes // len(pattern) + 1))[: view.nbytes]

    def content(self, block_id: int) -> bytes:
        """A copy of the block, its groups one after the other."""
        return b"".join(self.block_views(block_id))

    def region(self, worker_id: str, epoch: int = 1, address: str = "127.0.0.1:0") -> KVRegion:
        """This pool as a source is told of it."""
        return KVRegion(
            worker_id, epoch, self.layout, self.num_blocks, self.group_offsets, address, "fake", self._reference()
        )

    def close(self) -> None:
        """Offer the memory to no new reader. May be repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _reference(self) -> SharedMemoryRef | None:
        if self._fd < 0:
            return None
        cookie = bytes(self._memory[:_COOKIE_BYTES])
        return SharedMemoryRef(local_host_id(), os.getpid(), self._fd, self._memory.nbytes, cookie)


class Calls(Generic[T]):
    """A callback that keeps what it is called with, and lets a test wait for it."""

    def __init__(self) -> None:
        self._values: list[T] = []
        self._changed = threading.Condition()

    def __call__(self, value: T) -> None:
        with self._changed:
            self._values.append(value)
            self._changed.notify_all()

    @property
    def values(self) -> list[T]:
        with self._changed:
            return list(self._values)

    def wait(self, count: int = 1, timeout_s: float = 10.0) -> list[T]:
        """All values once there are ``count``. Raises ``TimeoutError``."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._values) >= count, timeout_s):
                raise TimeoutError(f"{len(self._values)} of {count} calls within {timeout_s:g} s")
            return list(self._values)
