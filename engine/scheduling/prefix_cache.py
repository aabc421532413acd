"""Which block holds which prefix. Filled as blocks are computed, emptied as the pool takes blocks for other content."""

from __future__ import annotations

from collections.abc import Sequence

from eagleray.core.block_hash import BlockHash, CachedBlock
from eagleray.core.errors import IntegrityError


class PrefixCache:
    """A two-way table of block hash and block number, with a log of changes for the cluster's index."""

    def __init__(self) -> None:
        self._block_of: dict[BlockHash, int] = {}
        self._content_of: dict[int, CachedBlock] = {}
        self._stored: list[CachedBlock] = []
        self._evicted: list[CachedBlock] = []

    def __len__(self) -> int:
        return len(self._block_of)

    def holds(self, block_id: int) -> bool:
        """Whether the content of ``block_id`` can be found."""
        return block_id in self._content_of

    def match(self, hashes: Sequence[BlockHash], limit: int) -> list[int]:
        """Blocks of the longest cached prefix, at most ``limit`` of them."""
        found: list[int] = []
        for block_hash in hashes[:limit]:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def store(self, block_id: int, content: CachedBlock) -> None:
        """``block_id`` now holds ``content``. The first to hold it wins: a double stays private to its request."""
        if content.hash not in self._block_of and block_id not in self._content_of:
            self._block_of[content.hash] = block_id
            self._content_of[block_id] = content
            self._stored.append(content)

    def forget(self, block_id: int) -> None:
        """``block_id`` is about to hold something else."""
        content = self._content_of.pop(block_id, None)
        if content is not None:
            del self._block_of[content.hash]
            self._evicted.append(content)

    def drain_changes(self) -> tuple[list[CachedBlock], list[CachedBlock]]:
        """(stored, evicted) since the last call. A hash in both lists was stored, then evicted, or the reverse: the
        cache is asked which it is now."""
        stored = [content for content in self._stored if content.hash in self._block_of]
        evicted = [content for content in self._evicted if content.hash not in self._block_of]
        self._stored, self._evicted = [], []
        return stored, evicted

    def check(self) -> None:
        """Raise ``IntegrityError`` unless the two tables mirror each other."""
        mirrored = {content.hash: block_id for block_id, content in self._content_of.items()}
        if mirrored != self._block_of:
            raise IntegrityError("prefix cache: hash -> block and block -> hash disagree")
