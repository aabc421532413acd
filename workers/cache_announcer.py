"""Tells ingresses over their own connections what a worker's cache holds: the prefix index without a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from eagleray.core.block_hash import BlockHash, CachedBlock
from eagleray.core.messages import CacheChanges

# A connection's first message of this kind would be too long for a frame where a cache holds millions.
BLOCKS_PER_MESSAGE: Final = 65536


class CacheAnnouncer:
    """A ``CacheListener``: passes changes on as they come, and keeps all that is held for whoever connects later."""

    def __init__(self, broadcast: Callable[[CacheChanges], None]) -> None:
        self._broadcast = broadcast
        self._lock = threading.Lock()  # the step thread writes, the channel's reads
        self._held: dict[BlockHash, CachedBlock] = {}

    def stored(self, blocks: list[CachedBlock]) -> None:
        with self._lock:
            self._held.update((block.hash, block) for block in blocks)
        self._broadcast(CacheChanges(stored=tuple(blocks)))

    def evicted(self, blocks: list[CachedBlock]) -> None:
        with self._lock:
            for block in blocks:
                self._held.pop(block.hash, None)
        self._broadcast(CacheChanges(evicted=tuple(blocks)))

    def all_held(self) -> list[CacheChanges]:
        """For a new connection, before any change. A change may be in it and come once more: that does no harm, because
        changes come in order."""
        with self._lock:
            held = list(self._held.values())
        parts = [held[start : start + BLOCKS_PER_MESSAGE] for start in range(0, len(held), BLOCKS_PER_MESSAGE)]
        return [CacheChanges(is_whole=True), *(CacheChanges(stored=tuple(part)) for part in parts)]
