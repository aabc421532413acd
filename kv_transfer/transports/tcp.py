"""Bytes over the pull's own connection: works everywhere, and is what is left when nothing better does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eagleray.core.errors import TransferError
from eagleray.core.kv_region import KVRegion
from eagleray.kv_transfer.fingerprint import PORTABLE_BLOCK_OPS, BlockOps
from eagleray.kv_transfer.link import Link
from eagleray.kv_transfer.wire import BlockBytes, ReadBlocks


class TcpTransport:
    """Received straight into place: no buffer of our own between the socket and the block."""

    name = "tcp"

    def __init__(self, ops: BlockOps = PORTABLE_BLOCK_OPS) -> None:
        self._ops = ops

    def open(self, source: KVRegion, link: Link) -> TcpReader:
        return TcpReader(link, self._ops, source.layout.digest())

    def close(self) -> None:
        """Nothing is kept between pulls."""


class TcpReader:
    """One request and one answer per ``read``. Announcements that come in between wait in the link."""

    def __init__(self, link: Link, ops: BlockOps, layout_digest: str) -> None:
        self._link = link
        self._ops = ops
        self._layout_digest = layout_digest

    def read(
        self, slots: Sequence[int], into: Sequence[Sequence[memoryview]], should_stop: Callable[[], bool]
    ) -> list[bytes]:
        self._link.send(ReadBlocks(tuple(slots)))
        answer = self._link.wait_for(BlockBytes)
        num_bytes = sum(view.nbytes for views in into for view in views)
        if not isinstance(answer, BlockBytes) or answer.num_bytes != num_bytes:
            raise TransferError(f"{self._link.peer} sends {answer} for {len(slots)} blocks of {num_bytes} bytes")
        fingerprints = []
        for views in into:
            if should_stop():
                raise TransferError(f"{self._link.peer}: the transfer was stopped here")
            self._link.receive_into(views)
            fingerprints.append(self._ops.fingerprint(self._layout_digest, views))
        return fingerprints

    def close(self) -> None:
        """The link belongs to the pull."""
