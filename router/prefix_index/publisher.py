"""A worker's side of the prefix index: tells it in batches what the worker's cache holds, for as long as it lives."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Mapping
from typing import Final

from eagleray.core.block_hash import BlockHash, CachedBlock
from eagleray.core.clock import Clock
from eagleray.router.prefix_index.index import Membership, PrefixIndex

BATCH_INTERVAL_S: Final = 0.05  # changes are gathered for so long
BATCH_BLOCKS: Final = 1024
RETRY_MAX_S: Final = 2.0
RENEWALS_PER_LEASE: Final = 3


class IndexPublisher:
    """Keeps a mirror of what the worker holds, so that an index that lost its data can be filled again.

    ``stored`` and ``evicted`` may be called from any thread and do no input or output. All else belongs to the event
    loop that runs ``run()``.
    """

    def __init__(
        self, index: PrefixIndex, worker_id: str, epoch: int, clock: Clock, *, lease_s: float, refresh_s: float
    ) -> None:
        """``lease_s`` as the index was built with; ``refresh_s``: publish everything again so often, before the
        backend lets unchanged entries expire."""
        self._index = index
        self._worker_id = worker_id
        self._epoch = epoch
        self._clock = clock
        self._lease_s = lease_s
        self._refresh_s = refresh_s
        self._renew_at_s = self._refresh_at_s = clock.now_s()
        self._lock = threading.Lock()  # guards the two below
        self._held: dict[BlockHash, CachedBlock] = {}
        self._changed: dict[BlockHash, CachedBlock] = {}  # since the last batch; stored when also in _held
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    def stored(self, blocks: Iterable[CachedBlock]) -> None:
        added = {block.hash: block for block in blocks}
        with self._lock:
            self._held.update(added)
            self._note_changed(added)

    def evicted(self, blocks: Iterable[CachedBlock]) -> None:
        removed = {block.hash: block for block in blocks}
        with self._lock:
            for block_hash in removed:
                self._held.pop(block_hash, None)
            self._note_changed(removed)

    @property
    def num_unpublished(self) -> int:
        """Changed blocks that the index has not taken yet."""
        return len(self._changed)

    async def run(self) -> None:
        """Publish until cancelled, then leave the index."""
        self._loop = asyncio.get_running_loop()
        retry_s = BATCH_INTERVAL_S
        try:
            while True:
                if await self.publish_once():
                    retry_s = BATCH_INTERVAL_S
                    await self._wait_for_work()
                else:
                    await asyncio.sleep(retry_s)
                    retry_s = min(2 * retry_s, RETRY_MAX_S)
        finally:
            self._loop = None
            await self._index.leave(self._worker_id)

    async def publish_once(self) -> bool:
        """Renew what is due and write one batch. False: the backend took less than that; what is left is kept."""
        now_s = self._clock.now_s()
        if now_s >= self._renew_at_s and not await self._join(now_s):
            return False
        stored, evicted = self._take_batch()
        if (stored or evicted) and not await self._index.update(self._worker_id, stored, evicted):
            self._give_back([*stored, *evicted])
            self._renew_at_s = now_s  # joining again tells what is still there
            return False
        return True

    async def _join(self, now_s: float) -> bool:
        membership = await self._index.join(self._worker_id, self._epoch)
        if membership is Membership.NOT_JOINED:
            return False
        self._renew_at_s = now_s + self._lease_s / RENEWALS_PER_LEASE
        if membership is Membership.NEW or now_s >= self._refresh_at_s:
            self._refresh_at_s = now_s + self._refresh_s
            with self._lock:
                self._changed = {**self._held, **self._changed}
        return True

    def _take_batch(self) -> tuple[list[CachedBlock], list[CachedBlock]]:
        with self._lock:
            batch = [self._changed.pop(key) for key in list(self._changed)[:BATCH_BLOCKS]]
            stored = [block for block in batch if block.hash in self._held]
            return stored, [block for block in batch if block.hash not in self._held]

    def _give_back(self, blocks: Iterable[CachedBlock]) -> None:
        with self._lock:
            self._changed = {**{block.hash: block for block in blocks}, **self._changed}

    async def _wait_for_work(self) -> None:
        """Until a renewal is due, or a batch's time after the first change; not at all while a backlog is left."""
        if self.num_unpublished >= BATCH_BLOCKS:
            await asyncio.sleep(0)
            return
        self._wake.clear()
        if not self.num_unpublished:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._renew_at_s - self._clock.now_s())):
                    await self._wake.wait()
        if self.num_unpublished:
            await asyncio.sleep(BATCH_INTERVAL_S)

    def _note_changed(self, blocks: Mapping[BlockHash, CachedBlock]) -> None:
        """The first change wakes the publisher; to wake it again for each that joins the batch would cost its thread,
        and the step's, more than the batch."""
        is_first = not self._changed
        self._changed.update(blocks)
        loop = self._loop
        if is_first and loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile: nobody is left to publish
                loop.call_soon_threadsafe(self._wake.set)
