"""KV blocks by number: how many holders each has, and which free one to take next.

    held (count > 0)  --release-->  free: of no use first, then least recently used  --allocate-->  held
                      <--retain---  (still cached: a prefix hit takes it back)

A block that nobody holds may still be cached: it is free *and* useful, and the queue's order decides how long. One that
is not is taken next: cached ones stay longer, and memory that was never touched stays so for as long as possible.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from eagleray.core.errors import IntegrityError


class BlockPool:
    """Counts holders of blocks ``0 .. num_blocks - 1``.

    ``is_cached(block)`` tells whether its content can be found; ``on_reuse(block)`` is told when a free block is taken
    for new content, so that a cache forgets what it held.
    """

    def __init__(
        self,
        num_blocks: int,
        is_cached: Callable[[int], bool] = lambda block_id: False,
        on_reuse: Callable[[int], None] | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self._is_cached = is_cached
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._on_reuse = on_reuse

    @property
    def num_free(self) -> int:
        return len(self._free)

    def holders(self, block_id: int) -> int:
        return self._holders[block_id]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks for new content. The caller has checked ``num_free``."""
        if count > len(self._free):
            raise IntegrityError(f"allocate({count}) with {len(self._free)} of {self.num_blocks} blocks free")
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in taken:
            self._holders[block_id] = 1
            if self._on_reuse is not None:
                self._on_reuse(block_id)
        return taken

    def retain(self, block_ids: Iterable[int]) -> None:
        """One more holder for each block; content stays."""
        for block_id in block_ids:
            if self._holders[block_id] == 0:
                del self._free[block_id]
            self._holders[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """One holder fewer for each block. The tail of a sequence becomes free first, so that its head, which more
        requests share, stays cached longest."""
        for block_id in reversed(block_ids):
            if self._holders[block_id] <= 0:
                raise IntegrityError(f"block {block_id} released more often than held")
            self._holders[block_id] -= 1
            if self._holders[block_id] == 0:
                self._free[block_id] = None
                if not self._is_cached(block_id):
                    self._free.move_to_end(block_id, last=False)

    def check(self, expected_holders: Sequence[int]) -> None:
        """Raise ``IntegrityError`` unless the counts are these and the free queue holds exactly the unheld blocks."""
        for block_id, expected in enumerate(expected_holders):
            if self._holders[block_id] != expected:
                raise IntegrityError(f"block {block_id}: {self._holders[block_id]} holders counted, {expected} found")
            if (expected == 0) != (block_id in self._free):
                raise IntegrityError(f"block {block_id}: {expected} holders, in free queue: {block_id in self._free}")
