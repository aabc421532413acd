"""Bytes within one process: for tests, for both kinds of worker in one process, and for making transfers fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from eagleray.core.errors import TransferError, TransportUnavailable
from eagleray.core.kv_region import KVRegion
from eagleray.kv_transfer.fingerprint import PORTABLE_BLOCK_OPS, BlockOps
from eagleray.kv_transfer.link import Link
from eagleray.kv_transfer.transport import BlockStore

# Called with the source's block id and the reader's views after each copy. It may raise ``TransferError`` (a cut),
# wait (a delay) or write into the views (corruption).
Fault = Callable[[int, Sequence[memoryview]], None]


def no_fault(slot: int, views: Sequence[memoryview]) -> None:
    """Everything arrives as it was sent."""


def cut_at(slot: int) -> Fault:
    """The transfer breaks after block ``slot`` was copied."""

    def fault(copied: int, views: Sequence[memoryview]) -> None:
        if copied == slot:
            raise TransferError(f"cut at block {slot}")

    return fault


def corrupt_at(slot: int) -> Fault:
    """One bit of block ``slot`` arrives wrong."""

    def fault(copied: int, views: Sequence[memoryview]) -> None:
        if copied == slot:
            views[-1][-1] ^= 1

    return fault


class LoopbackTransport:
    """Copies out of ``stores``, by worker id, of this process."""

    name = "loopback"

    def __init__(
        self, stores: Mapping[str, BlockStore], fault: Fault = no_fault, ops: BlockOps = PORTABLE_BLOCK_OPS
    ) -> None:
        self._stores = stores
        self._fault = fault
        self._ops = ops

    def open(self, source: KVRegion, link: Link) -> LoopbackReader:
        store = self._stores.get(source.worker_id)
        if store is None:
            raise TransportUnavailable(f"worker {source.worker_id} is not in this process")
        return LoopbackReader(store, self._fault, self._ops, source.layout.digest())

    def close(self) -> None:
        """Nothing is kept between pulls."""


class LoopbackReader:
    def __init__(self, store: BlockStore, fault: Fault, ops: BlockOps, layout_digest: str) -> None:
        self._store = store
        self._fault = fault
        self._ops = ops
        self._layout_digest = layout_digest

    def read(
        self, slots: Sequence[int], into: Sequence[Sequence[memoryview]], should_stop: Callable[[], bool]
    ) -> list[bytes]:
        fingerprints = []
        for slot, views in zip(slots, into, strict=True):
            if should_stop():
                raise TransferError("the transfer was stopped here")
            fingerprint = self._ops.copy(self._layout_digest, self._store.block_views(slot), views)
            if self._fault is not no_fault:
                self._fault(slot, views)
                fingerprint = self._ops.fingerprint(self._layout_digest, views)
            fingerprints.append(fingerprint)
        return fingerprints

    def close(self) -> None:
        """The store belongs to its worker."""
