"""Bytes out of the memory of another process on this host: one copy, from the source's block into the reader's.

The source's pool is an anonymous memory file; the reader opens it through ``/proc`` and maps it read-only. It vanishes
with its last process, so nothing is left behind whoever is killed.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from eagleray.core.errors import TransferError, TransportUnavailable
from eagleray.core.kv_layout import KVLayout
from eagleray.core.kv_region import KVRegion, SharedMemoryRef, local_host_id
from eagleray.kv_transfer.fingerprint import PORTABLE_BLOCK_OPS, BlockOps
from eagleray.kv_transfer.link import Link


class _Mapping(NamedTuple):
    ref: SharedMemoryRef
    data: npt.NDArray[np.uint8]  # [bytes of the file], read-only; unmapped with its last reference


class SharedMemoryTransport:
    """Keeps one mapping per source between pulls: the page tables of a mapping that was used before are filled."""

    name = "shared_memory"

    def __init__(self, ops: BlockOps = PORTABLE_BLOCK_OPS) -> None:
        self._ops = ops
        self._lock = threading.Lock()
        self._mappings: dict[str, _Mapping] = {}  # by worker id

    def open(self, source: KVRegion, link: Link) -> SharedMemoryReader:
        ref = source.shared_memory
        if ref is None:
            raise TransportUnavailable(f"worker {source.worker_id} keeps its KV pool in private memory")
        if ref.host_id != local_host_id():
            raise TransportUnavailable(f"worker {source.worker_id} runs on another host")
        with self._lock:
            self._drop_dead_sources()
            mapping = self._mappings.get(source.worker_id)
            if mapping is None or mapping.ref != ref:
                mapping = self._mappings[source.worker_id] = _Mapping(ref, _map_file(ref))
        return SharedMemoryReader(mapping.data, source.layout, source.group_offsets, self._ops)

    def close(self) -> None:
        with self._lock:
            self._mappings.clear()

    def _drop_dead_sources(self) -> None:
        """A mapping would keep the memory of a process that has died."""
        gone = [worker_id for worker_id, mapping in self._mappings.items() if not os.path.exists(_path(mapping.ref))]
        for worker_id in gone:
            del self._mappings[worker_id]


class SharedMemoryReader:
    def __init__(
        self, data: npt.NDArray[np.uint8], layout: KVLayout, group_offsets: Sequence[int], ops: BlockOps
    ) -> None:
        self._data = data
        self._ops = ops
        self._layout_digest = layout.digest()
        sizes = [group.block_bytes(layout.block_size_tokens) for group in layout.groups]
        self._groups = list(zip(group_offsets, sizes, strict=True))

    def read(
        self, slots: Sequence[int], into: Sequence[Sequence[memoryview]], should_stop: Callable[[], bool]
    ) -> list[bytes]:
        fingerprints = []
        for slot, views in zip(slots, into, strict=True):
            if should_stop():
                raise TransferError("the transfer was stopped here")
            fingerprints.append(self._ops.copy(self._layout_digest, self._block_views(slot), views))
        return fingerprints

    def close(self) -> None:
        self._data = np.empty(0, np.uint8)  # not a slice, which would keep the mapping

    def _block_views(self, slot: int) -> list[memoryview]:
        """Of the source's block, read-only."""
        starts = [offset + slot * size for offset, size in self._groups]
        ends = [start + size for start, (_, size) in zip(starts, self._groups, strict=True)]
        if slot < 0 or max(ends) > len(self._data):
            raise TransferError(f"block {slot} lies outside of the source's shared memory")
        return [self._data[start:end].data for start, end in zip(starts, ends, strict=True)]


def _path(ref: SharedMemoryRef) -> str:
    return f"/proc/{ref.pid}/fd/{ref.fd}"


def _map_file(ref: SharedMemoryRef) -> npt.NDArray[np.uint8]:
    """Raises ``TransportUnavailable`` unless the file is the one that ``ref`` was made for."""
    try:
        fd = os.open(_path(ref), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TransportUnavailable(
            f"{_path(ref)} cannot be opened ({error.strerror}): the source has ended, or runs in another container or "
            "as another user; let both see the same processes"
        ) from None
    try:
        if os.fstat(fd).st_size != ref.num_bytes:
            raise TransportUnavailable(f"{_path(ref)} is not the KV pool: its size is not {ref.num_bytes} bytes")
        mapping = mmap.mmap(fd, ref.num_bytes, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise TransportUnavailable(f"{_path(ref)} cannot be mapped: {error}") from None
    finally:
        os.close(fd)
    if mapping[: len(ref.cookie)] != ref.cookie:
        raise TransportUnavailable(f"{_path(ref)} is not the KV pool: its process has ended and the pid was reused")
    return np.frombuffer(mapping, np.uint8)
