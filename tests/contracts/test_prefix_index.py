"""What every prefix index does, in memory and in a real server."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from eagleray.core.block_hash import BlockHash, CachedBlock
from eagleray.core.clock import ManualClock, SystemClock
from eagleray.core.config import IndexConfig
from eagleray.router.prefix_index.factory import build_index
from eagleray.router.prefix_index.index import Membership, PrefixIndex
from eagleray.router.prefix_index.memory import MemoryPrefixIndex
from eagleray.router.prefix_index.redis import RedisPrefixIndex
from eagleray.router.prefix_index.server import find_server_binary, start_local_server

_namespaces = itertools.count()


def chain(name: str, length: int) -> list[CachedBlock]:
    """A chain of made-up blocks; chains of different names share nothing."""
    hashes = [BlockHash(f"{name}:{depth}".encode().ljust(16, b".")) for depth in range(length)]
    return [CachedBlock(hashes[0], block_hash) for block_hash in hashes]


def hashes(blocks: list[CachedBlock]) -> list[BlockHash]:
    return [block.hash for block in blocks]


@dataclass
class MemoryBackend:
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self) -> None:
        self._index = MemoryPrefixIndex(self.clock, lease_s=10.0)

    def open(self) -> PrefixIndex:
        return self._index

    def end_all_leases(self) -> None:
        self.clock.advance(10.0)

    async def close(self) -> None:
        await self._index.aclose()


@dataclass
class RedisBackend:
    url: str
    namespace: str = field(default_factory=lambda: f"contract-{next(_namespaces)}")
    opened: list[RedisPrefixIndex] = field(default_factory=list)

    def open(self) -> PrefixIndex:
        config = IndexConfig(url=self.url, timeout_s=2.0)  # generous: these tests are about content
        self.opened.append(RedisPrefixIndex(config, self.namespace, SystemClock(), roster_max_age_s=0.0))
        return self.opened[-1]

    def end_all_leases(self) -> None:
        with Redis.from_url(self.url) as client:
            for number, row in client.hgetall(f"kv:roster:{self.namespace}").items():
                if number != b"newest":
                    epoch, _, worker_id = row.split(b":", 2)
                    client.hset(f"kv:roster:{self.namespace}", number, b":".join((epoch, b"1", worker_id)))

    async def close(self) -> None:
        for index in self.opened:
            await index.aclose()


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    binary = find_server_binary()
    if binary is None:
        pytest.skip("no Redis-protocol server: install eagleray[local]")
    server = start_local_server(binary)
    yield server.url
    server.stop()


@pytest.fixture(params=["memory", "redis"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[MemoryBackend | RedisBackend]:
    made = MemoryBackend() if request.param == "memory" else RedisBackend(request.getfixturevalue("server_url"))
    yield made
    await made.close()


@pytest.fixture
def index(backend: MemoryBackend | RedisBackend) -> PrefixIndex:
    return backend.open()


async def test_an_empty_index_knows_nobody(index: PrefixIndex) -> None:
    assert await index.lookup(hashes(chain("a", 3))) == {}
    assert await index.lookup([]) == {}


async def test_a_lookup_counts_the_leading_blocks_of_each_worker(index: PrefixIndex) -> None:
    blocks = chain("a", 5)
    for worker_id, held in {
        "all": blocks,
        "two": blocks[:2],
        "hole": blocks[:1] + blocks[2:],
        "tail": blocks[1:],
    }.items():
        assert await index.join(worker_id, 1) is Membership.NEW
        assert await index.update(worker_id, held, [])
    assert await index.lookup(hashes(blocks)) == {"all": 5, "two": 2, "hole": 1}
    assert await index.lookup(hashes(blocks[:2])) == {"all": 2, "two": 2, "hole": 1}
    assert await index.lookup(hashes(chain("b", 2))) == {}


async def test_evicted_blocks_are_gone_for_that_worker_alone(index: PrefixIndex) -> None:
    blocks = chain("a", 3)
    for worker_id in ("x", "y"):
        await index.join(worker_id, 1)
        await index.update(worker_id, blocks, [])
    assert await index.update("x", [], blocks[1:2])
    assert await index.lookup(hashes(blocks)) == {"x": 1, "y": 3}


async def test_a_block_both_stored_and_evicted_counts_as_stored(index: PrefixIndex) -> None:
    blocks = chain("a", 2)
    await index.join("x", 1)
    assert await index.update("x", blocks, blocks)
    assert await index.lookup(hashes(blocks)) == {"x": 2}


async def test_blocks_of_many_roots_are_written_in_one_update(index: PrefixIndex) -> None:
    chains = [chain(f"chain {number}", 2) for number in range(40)] + [chain("long", 10_000)]
    await index.join("x", 1)
    assert await index.update("x", [block for blocks in chains for block in blocks], [])
    assert await index.lookup(hashes(chains[7])) == {"x": 2}
    assert await index.lookup(hashes(chains[-1])) == {"x": 10_000}


async def test_joining_again_keeps_what_was_published(index: PrefixIndex) -> None:
    blocks = chain("a", 2)
    await index.join("x", 1)
    await index.update("x", blocks, [])
    assert await index.join("x", 1) is Membership.RENEWED
    assert await index.lookup(hashes(blocks)) == {"x": 2}


async def test_a_later_epoch_drops_what_the_earlier_one_held(backend: MemoryBackend | RedisBackend) -> None:
    blocks = chain("a", 2)
    old, new = backend.open(), backend.open()
    await old.join("x", 1)
    await old.update("x", blocks, [])
    assert await new.join("x", 2) is Membership.NEW
    assert await new.lookup(hashes(blocks)) == {}
    assert await old.join("x", 1) is Membership.NOT_JOINED
    assert await new.join("x", 2) is Membership.RENEWED


async def test_a_worker_that_never_joined_cannot_publish(index: PrefixIndex) -> None:
    blocks = chain("a", 2)
    assert not await index.update("x", blocks, [])
    assert await index.lookup(hashes(blocks)) == {}


async def test_a_worker_whose_lease_ended_is_not_seen_until_it_joins_again(
    backend: MemoryBackend | RedisBackend,
) -> None:
    index, blocks = backend.open(), chain("a", 2)
    await index.join("x", 1)
    await index.update("x", blocks, [])
    backend.end_all_leases()
    assert await index.lookup(hashes(blocks)) == {}
    assert not await index.update("x", blocks, [])
    assert await index.join("x", 1) is Membership.RENEWED
    assert await index.lookup(hashes(blocks)) == {"x": 2}


async def test_a_worker_forgotten_after_its_lease_starts_from_nothing(backend: MemoryBackend | RedisBackend) -> None:
    index, blocks = backend.open(), chain("a", 2)
    await index.join("x", 1)
    await index.update("x", blocks, [])
    backend.end_all_leases()
    await index.join("someone else", 1)
    assert await index.join("x", 1) is Membership.NEW
    assert await index.lookup(hashes(blocks)) == {}


async def test_a_worker_that_left_is_gone_at_once(index: PrefixIndex) -> None:
    blocks = chain("a", 2)
    await index.join("x", 1)
    await index.update("x", blocks, [])
    await index.leave("x")
    assert await index.lookup(hashes(blocks)) == {}
    assert not await index.update("x", blocks, [])
    await index.leave("x")


async def test_many_workers_have_no_common_limit(index: PrefixIndex) -> None:
    blocks = chain("a", 2)
    workers = [f"worker {number}" for number in range(70)]
    for worker_id in workers:
        await index.join(worker_id, 1)
        await index.update(worker_id, blocks, [])
    assert await index.lookup(hashes(blocks)) == dict.fromkeys(workers, 2)


async def test_status_counts_lookups(index: PrefixIndex) -> None:
    for _ in range(3):
        await index.lookup(hashes(chain("a", 1)))
    status = index.status()
    assert (status.state, status.lookups, status.failed_lookups, status.last_error) == ("up", 3, 0, None)


CHAINS = [chain("p", 4), chain("q", 4)]
BLOCKS = st.lists(st.sampled_from([block for blocks in CHAINS for block in blocks]), max_size=4)
WORKERS = st.sampled_from(["x", "y", "z"])
COMMANDS = st.one_of(
    st.tuples(st.just("join"), WORKERS, st.integers(1, 3)),
    st.tuples(st.just("update"), WORKERS, BLOCKS, BLOCKS),
    st.tuples(st.just("leave"), WORKERS),
    st.tuples(st.just("end_all_leases")),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commands=st.lists(COMMANDS, max_size=15))
async def test_redis_answers_as_memory_does(server_url: str, commands: list[tuple[object, ...]]) -> None:
    backends = (MemoryBackend(), RedisBackend(server_url))
    memory, redis = (backend.open() for backend in backends)
    for name, *arguments in commands:
        if name == "end_all_leases":
            for backend in backends:
                backend.end_all_leases()
        else:
            assert await getattr(memory, name)(*arguments) == await getattr(redis, name)(*arguments)
        for blocks in CHAINS:
            assert await memory.lookup(hashes(blocks)) == await redis.lookup(hashes(blocks))
    await backends[1].close()


def test_the_factory_builds_what_the_configuration_names() -> None:
    assert isinstance(build_index(IndexConfig(backend="memory"), "m", SystemClock()), MemoryPrefixIndex)
    assert isinstance(build_index(IndexConfig(url="redis://nowhere:1"), "m", SystemClock()), RedisPrefixIndex)
