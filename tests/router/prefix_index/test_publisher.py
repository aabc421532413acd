from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence

import pytest

from eagleray.core.block_hash import BlockHash, CachedBlock
from eagleray.core.clock import ManualClock, SystemClock
from eagleray.router.prefix_index.memory import MemoryPrefixIndex
from eagleray.router.prefix_index.publisher import BATCH_BLOCKS, IndexPublisher

LEASE_S = 9.0
REFRESH_S = 100.0


class StubbornIndex(MemoryPrefixIndex):
    """Takes no update while ``refuses`` is set; remembers the sizes of those it took."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock, LEASE_S)
        self.refuses = False
        self.sizes: list[tuple[int, int]] = []

    async def update(self, worker_id: str, stored: Sequence[CachedBlock], evicted: Sequence[CachedBlock]) -> bool:
        if self.refuses:
            return False
        self.sizes.append((len(stored), len(evicted)))
        return await super().update(worker_id, stored, evicted)


def chain(length: int) -> list[CachedBlock]:
    hashes = [BlockHash(f"block {depth}".encode().ljust(16, b".")) for depth in range(length)]
    return [CachedBlock(hashes[0], block_hash) for block_hash in hashes]


def world(epoch: int = 1) -> tuple[ManualClock, StubbornIndex, IndexPublisher]:
    clock = ManualClock()
    index = StubbornIndex(clock)
    return clock, index, IndexPublisher(index, "x", epoch, clock, lease_s=LEASE_S, refresh_s=REFRESH_S)


async def visible(index: MemoryPrefixIndex, blocks: list[CachedBlock]) -> int:
    return (await index.lookup([block.hash for block in blocks])).get("x", 0)


async def test_what_is_stored_and_not_evicted_is_published() -> None:
    _, index, publisher = world()
    blocks = chain(4)
    publisher.stored(blocks)
    publisher.evicted(blocks[2:3])
    assert await publisher.publish_once()
    assert await visible(index, blocks) == 2
    publisher.stored(blocks[2:3])
    assert await publisher.publish_once()
    assert await visible(index, blocks) == 4


async def test_changes_that_cancel_out_are_published_as_their_outcome() -> None:
    _, index, publisher = world()
    blocks = chain(1)
    publisher.stored(blocks)
    publisher.evicted(blocks)
    publisher.stored(blocks)
    await publisher.publish_once()
    assert index.sizes == [(1, 0)]


async def test_a_batch_has_a_bound() -> None:
    _, index, publisher = world()
    publisher.stored(chain(BATCH_BLOCKS + 5))
    await publisher.publish_once()
    assert publisher.num_unpublished == 5
    await publisher.publish_once()
    assert index.sizes == [(BATCH_BLOCKS, 0), (5, 0)]


async def test_a_refused_batch_is_kept_and_later_changes_win() -> None:
    _, index, publisher = world()
    blocks = chain(3)
    publisher.stored(blocks)
    index.refuses = True
    assert not await publisher.publish_once()
    publisher.evicted(blocks[2:])
    index.refuses = False
    assert await publisher.publish_once()
    assert publisher.num_unpublished == 0
    assert await visible(index, blocks) == 2
    assert index.sizes == [(2, 1)]


async def test_an_index_that_lost_everything_is_filled_again() -> None:
    _, index, publisher = world()
    blocks = chain(3)
    publisher.stored(blocks)
    await publisher.publish_once()
    await index.aclose()
    publisher.evicted(blocks[2:])
    assert not await publisher.publish_once()
    assert await publisher.publish_once()
    assert await visible(index, blocks) == 2


async def test_an_idle_publisher_notices_the_loss_when_it_renews() -> None:
    clock, index, publisher = world()
    blocks = chain(3)
    publisher.stored(blocks)
    await publisher.publish_once()
    await index.aclose()
    clock.advance(LEASE_S / 3)
    await publisher.publish_once()
    assert await visible(index, blocks) == 3


async def test_the_lease_is_renewed_in_time() -> None:
    clock, index, publisher = world()
    blocks = chain(1)
    publisher.stored(blocks)
    for _ in range(20):
        assert await publisher.publish_once()
        assert await visible(index, blocks) == 1
        clock.advance(LEASE_S / 2)
    assert index.sizes[:1] == [(1, 0)] and len(index.sizes) == 1


async def test_everything_is_published_again_before_it_expires() -> None:
    clock, index, publisher = world()
    publisher.stored(chain(2))
    for _ in range(int(2.5 * REFRESH_S)):
        await publisher.publish_once()
        clock.advance(1.0)
    assert index.sizes == [(2, 0)] * 3


async def test_an_epoch_that_was_replaced_publishes_nothing() -> None:
    _, index, publisher = world(epoch=1)
    blocks = chain(1)
    await index.join("x", 2)
    publisher.stored(blocks)
    assert not await publisher.publish_once()
    assert await visible(index, blocks) == 0


async def test_run_publishes_what_another_thread_reports_and_leaves_at_the_end() -> None:
    lease_s = 3600.0  # so that no renewal wakes it
    index = MemoryPrefixIndex(SystemClock(), lease_s)
    publisher = IndexPublisher(index, "x", 1, SystemClock(), lease_s=lease_s, refresh_s=lease_s)
    blocks = chain(400)
    task = asyncio.create_task(publisher.run())
    reporter = threading.Thread(target=lambda: [publisher.stored([block]) for block in blocks])
    reporter.start()
    await until(lambda: not reporter.is_alive() and publisher.num_unpublished == 0)
    assert await visible(index, blocks) == 400
    publisher.evicted(blocks[100:])  # from the loop's own thread, after it had gone idle
    await until(lambda: publisher.num_unpublished == 0)
    assert await visible(index, blocks) == 100
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert await visible(index, blocks) == 0
    publisher.stored(blocks)  # an engine thread that stops later than the loop


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_only_the_first_change_of_a_batch_wakes_the_publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, publisher = world()
    woken: list[Callable[[], None]] = []
    publishing = asyncio.create_task(publisher.run())
    await asyncio.sleep(0)  # it has begun
    monkeypatch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", woken.append)
    blocks = chain(3)
    publisher.stored(blocks[:1])
    publisher.stored(blocks[1:])
    publisher.evicted(blocks[:1])
    assert len(woken) == 1
    assert await publisher.publish_once()
    publisher.evicted(blocks[1:])
    assert len(woken) == 2
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)
