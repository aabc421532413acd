"""What becomes of look-ups and writes when the server is killed, stalled, restarted, full or wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from redis import Redis

from eagleray.core.block_hash import BlockHash, CachedBlock
from eagleray.core.clock import ManualClock, SystemClock
from eagleray.core.config import IndexConfig
from eagleray.core.errors import ConfigError
from eagleray.router.prefix_index.index import Membership
from eagleray.router.prefix_index.publisher import IndexPublisher
from eagleray.router.prefix_index.redis import RedisPrefixIndex, ScriptCall
from eagleray.router.prefix_index.server import LocalServer, start_local_server

NAMESPACE = "model"
ROSTER_KEY = f"kv:roster:{NAMESPACE}"
TIMEOUT_S = 0.2
StartServer = Callable[[], LocalServer]


def chain(name: str, length: int) -> list[CachedBlock]:
    hashes = [BlockHash(f"{name}:{depth}".encode().ljust(16, b".")) for depth in range(length)]
    return [CachedBlock(hashes[0], block_hash) for block_hash in hashes]


BLOCKS = chain("a", 4)
HASHES = [block.hash for block in BLOCKS]


@pytest.fixture
def server(start_server: StartServer) -> LocalServer:
    return start_server()


@pytest.fixture
def admin(server: LocalServer) -> Iterator[Redis]:
    with Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def index(server: LocalServer, clock: ManualClock) -> AsyncIterator[RedisPrefixIndex]:
    config = IndexConfig(url=server.url, timeout_s=TIMEOUT_S, breaker_failures=3, breaker_reset_s=1.0)
    made = RedisPrefixIndex(config, NAMESPACE, clock)
    assert await made.join("x", 1) is Membership.NEW
    assert await made.update("x", BLOCKS, [])
    assert await made.lookup(HASHES) == {"x": 4}
    yield made
    await made.aclose()


@pytest.fixture
async def other(server: LocalServer, clock: ManualClock) -> AsyncIterator[RedisPrefixIndex]:
    """A second process's view of the same index, always up to date."""
    config = IndexConfig(url=server.url, timeout_s=TIMEOUT_S)
    made = RedisPrefixIndex(config, NAMESPACE, clock, roster_max_age_s=0.0)
    yield made
    await made.aclose()


async def wait_until_gone(server: LocalServer) -> None:
    async with asyncio.timeout(5):
        while server._process.returncode is None:
            await asyncio.sleep(0.002)


async def test_a_killed_server_means_no_answers_and_an_open_breaker(
    index: RedisPrefixIndex, server: LocalServer
) -> None:
    os.kill(server.pid, signal.SIGKILL)
    await wait_until_gone(server)
    for _ in range(5):
        assert await index.lookup(HASHES) == {}
    status = index.status()
    assert status.state == "down"
    assert (status.failed_lookups, status.skipped_lookups) == (3, 2)
    assert "Error" in (status.last_error or "")
    assert await index.join("x", 1) is Membership.NOT_JOINED
    assert not await index.update("x", BLOCKS, [])
    await index.leave("x")


async def test_a_restarted_server_is_filled_again_by_the_publisher(
    server: LocalServer, clock: ManualClock, start_server: StartServer
) -> None:
    index = RedisPrefixIndex(IndexConfig(url=server.url, timeout_s=TIMEOUT_S), NAMESPACE, clock)
    publisher = IndexPublisher(index, "x", 1, clock, lease_s=10.0, refresh_s=1000.0)
    publisher.stored(BLOCKS)
    assert await publisher.publish_once()
    os.kill(server.pid, signal.SIGKILL)
    await wait_until_gone(server)
    publisher.evicted(BLOCKS[3:])
    while index.status().state == "up":
        assert not await publisher.publish_once()
    start_server()
    clock.advance(1.0)  # the breaker lets a probe through
    assert await publisher.publish_once()
    assert await index.lookup(HASHES) == {"x": 3}
    assert index.status().state == "up"
    await index.aclose()


async def test_a_server_that_lost_its_data_gives_out_other_numbers_than_before(
    index: RedisPrefixIndex, admin: Redis
) -> None:
    def numbers() -> set[bytes]:
        return set(admin.hkeys(ROSTER_KEY)) - {b"newest"}

    for worker in range(20):
        await index.join(f"old {worker}", 1)
    before = numbers()
    admin.flushall()
    for worker in range(20):
        await index.join(f"new {worker}", 1)
    assert len(before) == 21 and len(numbers()) == 20
    assert not before & numbers()


async def test_a_worker_does_not_write_under_a_number_that_became_anothers(
    index: RedisPrefixIndex, admin: Redis
) -> None:
    number, row = next(item for item in admin.hgetall(ROSTER_KEY).items() if item[0] != b"newest")
    admin.hset(ROSTER_KEY, number, row.replace(b":x", b":y"))
    assert not await index.update("x", chain("b", 2), [])
    assert await index.lookup([block.hash for block in chain("b", 2)]) == {}


async def test_a_server_that_lost_the_scripts_gets_them_again(index: RedisPrefixIndex, admin: Redis) -> None:
    admin.script_flush()
    assert await index.update("x", chain("b", 2) + chain("c", 2), [])
    assert await index.lookup([block.hash for block in chain("c", 2)]) == {"x": 2}
    assert index.status().last_error is None


async def test_a_stalled_server_delays_a_lookup_by_the_timeout_at_most(
    index: RedisPrefixIndex, server: LocalServer, clock: ManualClock
) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    started_s = time.monotonic()
    assert await asyncio.gather(*(index.lookup(HASHES) for _ in range(50))) == [{}] * 50
    waited_s = time.monotonic() - started_s
    os.kill(server.pid, signal.SIGCONT)
    assert waited_s < 5 * TIMEOUT_S  # far from the client library's own retries, with room for a busy machine
    assert index.status().state == "down"
    clock.advance(1.0)
    assert await index.lookup(HASHES) == {"x": 4}, "the answer to an earlier question was taken for this one's"
    assert index.status().state == "up"


async def test_an_abandoned_lookup_leaves_no_reply_behind_for_the_next(
    index: RedisPrefixIndex, server: LocalServer
) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    abandoned = asyncio.create_task(index.lookup(HASHES[:1]))
    await asyncio.sleep(0)  # it has sent its question
    await asyncio.sleep(0)
    abandoned.cancel()
    await asyncio.gather(abandoned, return_exceptions=True)
    os.kill(server.pid, signal.SIGCONT)
    assert await index.lookup(HASHES) == {"x": 4}


async def test_a_lookup_is_one_hmget_while_the_roster_is_fresh_and_one_round_trip_when_not(
    index: RedisPrefixIndex, admin: Redis, clock: ManualClock
) -> None:
    commands = lambda: {name: stat["calls"] for name, stat in admin.info("commandstats").items()}  # noqa: E731
    admin.config_resetstat()
    await index.lookup(HASHES)
    assert {"cmdstat_hmget": 1}.items() <= commands().items() and "cmdstat_hgetall" not in commands()
    clock.advance(1.0)
    await index.lookup(HASHES)
    assert {"cmdstat_hmget": 2, "cmdstat_hgetall": 1, "cmdstat_time": 1}.items() <= commands().items()


async def test_a_worker_that_stops_renewing_is_forgotten(server: LocalServer) -> None:
    config = IndexConfig(url=server.url, timeout_s=TIMEOUT_S, lease_s=0.3)
    index = RedisPrefixIndex(config, NAMESPACE, SystemClock())
    await index.join("x", 1)
    await index.update("x", BLOCKS, [])
    assert await index.lookup(HASHES) == {"x": 4}
    async with asyncio.timeout(5):
        while await index.lookup(HASHES):
            await asyncio.sleep(0.01)
    await index.aclose()


async def test_a_late_write_of_a_replaced_epoch_is_attributed_to_nobody(
    index: RedisPrefixIndex, other: RedisPrefixIndex
) -> None:
    async def replace_it() -> None:
        await other.join("x", 2)
        await other.join("y", 1)

    late = chain("b", 2)
    before_scripts(index, replace_it)
    assert await index.update("x", late, [])
    assert await other.lookup([block.hash for block in late]) == {}
    assert await other.lookup(HASHES) == {}


async def test_a_worker_that_joined_during_anothers_write_keeps_its_blocks(
    index: RedisPrefixIndex, other: RedisPrefixIndex
) -> None:
    async def join_and_publish() -> None:
        await other.join("y", 1)
        await other.update("y", BLOCKS, [])

    before_scripts(index, join_and_publish)
    assert await index.update("x", BLOCKS[:2], BLOCKS[2:])
    assert await other.lookup(HASHES) == {"x": 2, "y": 4}


def before_scripts(index: RedisPrefixIndex, happens: Callable[[], Awaitable[None]]) -> None:
    """Let something happen after ``index`` read the roster and before its scripts run."""
    run_scripts = index._run_scripts

    async def run_after(calls: Sequence[ScriptCall]) -> list[object]:
        await happens()
        return await run_scripts(calls)

    index._run_scripts = run_after  # type: ignore[method-assign]


async def test_what_a_dead_worker_left_goes_with_later_writes_to_the_same_root(
    index: RedisPrefixIndex, admin: Redis
) -> None:
    key = admin.keys("kv:{*")[0]
    await index.leave("x")
    await index.join("y", 1)
    for _ in range(40):  # each write also cleans a few blocks at random
        await index.update("y", BLOCKS[:1], [])
    assert admin.hkeys(key) == [HASHES[0]]
    assert len(admin.hget(key, HASHES[0])) == 4


async def test_evicting_the_last_block_leaves_no_key(index: RedisPrefixIndex, admin: Redis) -> None:
    await index.update("x", [], BLOCKS)
    assert admin.keys("kv:{*") == []


async def test_roots_expire_and_the_roster_does_not(index: RedisPrefixIndex, admin: Redis) -> None:
    assert 0 < admin.ttl(admin.keys("kv:{*")[0]) <= 3600
    assert admin.ttl(ROSTER_KEY) == -1


async def test_a_full_server_refuses_writes_without_an_error_and_goes_on_answering(
    index: RedisPrefixIndex, admin: Redis
) -> None:
    admin.config_set("maxmemory-policy", "noeviction")
    admin.config_set("maxmemory", 1)
    for _ in range(4):  # more than the breaker bears, if these were failures
        assert not await index.update("x", chain("b", 2), [])
    assert "OutOfMemory" in (index.status().last_error or "")
    assert await index.lookup(HASHES) == {"x": 4}
    assert index.status().state == "down", "what it knows goes stale"
    admin.config_set("maxmemory", 0)
    assert await index.update("x", chain("b", 2), [])
    assert index.status().state == "up"


@pytest.fixture
async def old_server(server_binary: Path, tmp_path: Path) -> AsyncIterator[LocalServer]:
    """Without the command that Redis 6.2 brought."""
    program = tmp_path / "server"
    program.write_text(f"#!/bin/sh\nexec {server_binary} \"$@\" --rename-command HRANDFIELD ''\n")
    program.chmod(0o755)
    server = start_local_server(program)
    yield server
    server.stop()


async def test_a_server_that_lacks_a_command_leaves_no_lasting_key_and_does_not_count_as_up(
    old_server: LocalServer, clock: ManualClock
) -> None:
    index = RedisPrefixIndex(IndexConfig(url=old_server.url, timeout_s=TIMEOUT_S), NAMESPACE, clock)
    for _ in range(3):
        assert await index.join("x", 1) is not Membership.NOT_JOINED  # as a publisher does before each try
        assert not await index.update("x", BLOCKS, [])
    assert index.status().state == "down"
    assert "script" in (index.status().last_error or "")
    with Redis.from_url(old_server.url) as admin:
        assert all(admin.ttl(key) > 0 for key in admin.keys("kv:{*"))
    await index.aclose()


async def test_a_server_that_is_too_old_is_named_by_its_version_and_never_used(
    server: LocalServer, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, admin: Redis
) -> None:
    monkeypatch.setattr("eagleray.router.prefix_index.scripts.MIN_VERSION", (99, 1))
    config = IndexConfig(url=server.url, timeout_s=TIMEOUT_S, breaker_failures=3)
    reader, writer = (RedisPrefixIndex(config, NAMESPACE, clock) for _ in range(2))
    for _ in range(3):
        assert await reader.lookup(HASHES) == {}
        assert await writer.join("x", 1) is Membership.NOT_JOINED
    for index in (reader, writer):
        assert index.status().state == "down"
        assert "is too old for the prefix index, which needs Redis 99.1" in (index.status().last_error or "")
        await index.aclose()
    assert admin.dbsize() == 0


async def test_an_account_that_may_not_ask_for_the_version_can_use_the_index(
    server: LocalServer, clock: ManualClock, admin: Redis
) -> None:
    admin.execute_command(
        "ACL", "SETUSER", "limited", "on", ">secret", "~kv:*", "+hmget", "+hgetall", "+hdel", "+evalsha",
        "+script|load", "+time", "+hset", "+hrandfield", "+expire",
    )  # fmt: skip
    url = server.url.replace("unix://", "unix://limited:secret@")
    index = RedisPrefixIndex(IndexConfig(url=url, timeout_s=TIMEOUT_S), NAMESPACE, clock)
    assert await index.join("x", 1) is Membership.NEW
    assert await index.update("x", BLOCKS, [])
    assert await index.lookup(HASHES) == {"x": 4}
    await index.aclose()


@pytest.mark.parametrize("value", [b"", b"x", b"garbage", b"12345678"])
async def test_a_value_that_is_no_list_of_holders_names_nobody_and_is_written_over(
    index: RedisPrefixIndex, admin: Redis, value: bytes
) -> None:
    key = admin.keys("kv:{*")[0]
    for field in HASHES:
        admin.hset(key, field, value)
    assert await index.lookup(HASHES) == {}
    assert index.status().state == "up"
    assert await index.update("x", BLOCKS, [])
    assert await index.lookup(HASHES) == {"x": 4}


@pytest.mark.parametrize("name", [b"newest", b"5", b"x", b"99999999999"])
@pytest.mark.parametrize("row", [b"", b"\xff", b"1:2", b"nonsense:of:some sort", b"99999999999", b"-1"])
async def test_a_roster_with_rows_of_another_kind_is_used_all_the_same(
    index: RedisPrefixIndex, other: RedisPrefixIndex, admin: Redis, name: bytes, row: bytes
) -> None:
    admin.hset(ROSTER_KEY, name, row)
    assert await other.lookup(HASHES) == {"x": 4}
    assert await index.update("x", BLOCKS[:2], BLOCKS[2:])
    assert await other.join("y", 1) is Membership.NEW
    assert await other.update("y", BLOCKS[:1], [])
    assert await other.lookup(HASHES) == {"x": 2, "y": 1}


async def test_a_small_server_drops_roots_and_keeps_the_workers(index: RedisPrefixIndex, admin: Redis) -> None:
    admin.config_set("maxmemory", admin.info("memory")["used_memory"] + 500_000)
    for number in range(60):
        blocks = [block for part in range(16) for block in chain(f"{number}.{part}", 32)]
        assert await index.update("x", blocks, [])
    assert await index.lookup([block.hash for block in chain("59.15", 32)]) == {"x": 32}
    assert admin.info("stats")["evicted_keys"] > 0


async def test_an_answer_of_the_wrong_kind_is_no_answer(index: RedisPrefixIndex, admin: Redis) -> None:
    key = admin.keys("kv:{*")[0]
    admin.delete(key)
    admin.set(key, "not a hash")
    assert await index.lookup(HASHES) == {}
    assert "WRONGTYPE" in (index.status().last_error or "")


@pytest.mark.parametrize("url", [None, "", "http://example.org"])
def test_a_url_that_cannot_be_used_is_a_configuration_error(url: str | None) -> None:
    with pytest.raises(ConfigError, match=r"index\.url"):
        RedisPrefixIndex(IndexConfig(url=url), NAMESPACE, SystemClock())
