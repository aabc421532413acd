"""The prefix index without a server: what workers hold is told on their connections and filed in the ingress."""

from __future__ import annotations

from typing import Any, cast

import pytest

from eagleray.core.block_hash import BlockHash, CachedBlock
from eagleray.core.clock import ManualClock
from eagleray.core.messages import CacheChanges
from eagleray.core.snapshot import Role
from eagleray.router.fake_workers import FakeWorker, fake_welcome
from eagleray.workers import cache_announcer
from eagleray.workers.cache_announcer import CacheAnnouncer
from eagleray.workers.cache_follower import CacheFollower


def blocks(*names: int) -> list[CachedBlock]:
    return [CachedBlock(BlockHash(b"root"), BlockHash(bytes([name]))) for name in names]


HASHES = [block.hash for block in blocks(1, 2, 3)]


class Connection:
    """Hears everything that a worker announces, and passes it on when told to."""

    def __init__(self, follower: CacheFollower, worker_id: str = "w") -> None:
        self.client = cast(Any, FakeWorker(fake_welcome(worker_id, Role.DECODE)))
        self.follower = follower
        self.unread: list[CacheChanges] = []

    async def read(self) -> None:
        while self.unread:
            await self.follower.heard(self.client, self.unread.pop(0))


async def test_a_connection_hears_what_was_held_before_it_and_each_change_after() -> None:
    follower = CacheFollower(ManualClock())
    connection = Connection(follower)
    announcer = CacheAnnouncer(connection.unread.append)
    announcer.stored(blocks(1, 2, 3))
    announcer.evicted(blocks(3))
    connection.unread = announcer.all_held()
    await connection.read()
    assert await follower.index.lookup(HASHES) == {"w": 2}
    for changes in (CacheChanges(stored=tuple(blocks(3))), CacheChanges(evicted=tuple(blocks(2)))):
        await follower.heard(connection.client, changes)
    assert await follower.index.lookup(HASHES) == {"w": 1}


async def test_a_change_that_is_heard_again_after_the_whole_does_no_harm() -> None:
    """The step thread changes the cache while a connection is greeted: what it told may come twice, in order."""
    follower = CacheFollower(ManualClock())
    connection = Connection(follower)
    announcer = CacheAnnouncer(connection.unread.append)
    announcer.stored(blocks(1, 2))
    announcer.evicted(blocks(2))
    connection.unread = [*announcer.all_held(), *connection.unread]
    await connection.read()
    assert await follower.index.lookup(HASHES) == {"w": 1}


async def test_a_large_cache_is_told_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_announcer, "BLOCKS_PER_MESSAGE", 2)
    announcer = CacheAnnouncer(lambda changes: None)
    announcer.stored(blocks(1, 2, 3))
    assert [len(part.stored) for part in announcer.all_held()] == [0, 2, 1]


async def test_what_a_connection_told_is_forgotten_with_it_unless_a_newer_one_has_taken_its_place() -> None:
    follower = CacheFollower(ManualClock())
    announcer = CacheAnnouncer(lambda changes: None)
    announcer.stored(blocks(1, 2, 3))
    old, new, other = Connection(follower), Connection(follower), Connection(follower, "other")
    for connection in (old, other, new):
        connection.unread = announcer.all_held()
        await connection.read()
    await follower.lost(old.client)
    assert await follower.index.lookup(HASHES) == {"w": 3, "other": 3}
    await follower.heard(old.client, CacheChanges(evicted=tuple(blocks(1))))  # it does not count any more
    assert await follower.index.lookup(HASHES) == {"w": 3, "other": 3}
    await follower.lost(new.client)
    assert await follower.index.lookup(HASHES) == {"other": 3}


async def test_a_worker_needs_no_renewal_while_it_is_connected() -> None:
    clock = ManualClock()
    follower = CacheFollower(clock)
    await follower.heard(Connection(follower).client, CacheChanges(tuple(blocks(1)), is_whole=True))
    clock.advance(1e9)
    assert await follower.index.lookup(HASHES) == {"w": 1}
