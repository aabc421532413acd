"""The seams of a transfer: where blocks lie, and what moves their bytes.

A transport moves bytes and knows no request. It never writes into a pool that it does not own: the reader's side
copies into the reader's blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from eagleray.core.kv_region import KVRegion
from eagleray.kv_transfer.link import Link


class BlockStore(Protocol):
    """A pool of KV blocks as bytes."""

    def block_views(self, block_id: int) -> Sequence[memoryview]:
        """The writable bytes of one block, contiguous, one view per layer group in the layout's order."""
        ...


class BlockReader(Protocol):
    """Reads blocks of one source for one pull."""

    def read(
        self, slots: Sequence[int], into: Sequence[Sequence[memoryview]], should_stop: Callable[[], bool]
    ) -> list[bytes]:
        """Copy block ``slots[i]`` of the source into the views ``into[i]``; returns the fingerprints of what arrived
        there, which is cheapest while the bytes are at hand.

        On return, also by an exception, nothing writes into the views any more. Looks at ``should_stop`` between
        blocks. Raises ``TransferError`` when stopped or when bytes are missing: then ``into`` holds anything.
        """
        ...

    def close(self) -> None:
        """Let go of what this pull used. May be repeated."""
        ...


class Transport(Protocol):
    """One way to move bytes; one object serves all pulls of a worker, from any thread."""

    @property
    def name(self) -> str: ...

    def open(self, source: KVRegion, link: Link) -> BlockReader:
        """A reader for one pull. ``link`` is the pull's own connection, subscribed already.

        Raises ``TransportUnavailable`` saying what is missing between these two workers.
        """
        ...

    def close(self) -> None:
        """Let go of what is kept between pulls. May be repeated."""
        ...
