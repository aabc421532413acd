"""The prefix index in Redis or Valkey: one hash per first block, so that a look-up is one HMGET on one key.

Key ``kv:{<root>}:<namespace>``, field = 16 bytes of a block's hash, value = its holders (``roster.py``). The holders'
leases lie in ``kv:roster:<namespace>``; readers keep a copy for a moment and fetch the next in the look-up's own round
trip. An account limited to ``~kv:* +hmget +hgetall +hdel +evalsha +script|load +time`` and what the scripts call
(``hset hrandfield expire``) is enough; with ``+info`` a server that is too old is named as such.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, NoScriptError, RedisError, ResponseError

from eagleray.core.block_hash import BlockHash, CachedBlock
from eagleray.core.clock import Clock
from eagleray.core.config import IndexConfig
from eagleray.core.errors import ConfigError
from eagleray.router.prefix_index.breaker import CircuitBreaker
from eagleray.router.prefix_index.index import IndexStatus, Membership
from eagleray.router.prefix_index.roster import Roster, pack_incarnations
from eagleray.router.prefix_index.scripts import ALL_SCRIPTS, JOIN, UPDATE, Script, why_too_old

ROSTER_MAX_AGE_S: Final = 0.5  # a worker that joins is seen, and one that leaves is forgotten, within this time
WRITE_DEADLINE_S: Final = 1.0  # nobody waits for a write but the publisher
MAX_CONNECTIONS: Final = 32
FIELDS_PER_SCRIPT: Final = 512  # keeps the server responsive, and below Lua's limit on arguments

_logger = logging.getLogger(__name__)
T = TypeVar("T")
ScriptCall = tuple[Script, str, list[bytes | str | int]]  # script, its one key, its arguments


class ServerTooOld(RedisError):
    """The server answers, but cannot hold the index."""


class RedisPrefixIndex:
    """A ``PrefixIndex`` on a server that may be slow, away or empty at any moment."""

    def __init__(
        self, config: IndexConfig, namespace: str, clock: Clock, roster_max_age_s: float = ROSTER_MAX_AGE_S
    ) -> None:
        """``config.url`` must be set; nothing is connected yet.

        Raises ``ConfigError`` when the URL is missing or not one of ``redis://``, ``rediss://`` and ``unix://``.
        """
        self._config = config
        self._namespace = namespace
        self._clock = clock
        self._roster_max_age_s = roster_max_age_s
        self._reader = _connect(config.url, config.timeout_s)
        self._writer = _connect(config.url, WRITE_DEADLINE_S)
        self._breaker = CircuitBreaker(config.breaker_failures, config.breaker_reset_s, clock)
        self._refusals = CircuitBreaker(config.breaker_failures, config.breaker_reset_s, clock)  # counts; stops nothing
        self._roster = Roster()
        self._is_version_checked = False
        self._incarnations: dict[str, int] = {}  # of the workers that joined here
        self._lookups = self._failed_lookups = self._skipped_lookups = 0
        self._last_error: str | None = None

    async def lookup(self, hashes: Sequence[BlockHash]) -> Mapping[str, int]:
        if not hashes:
            return {}
        self._lookups += 1
        if not self._breaker.allows():
            self._skipped_lookups += 1
            return {}
        values = await self._attempt(lambda: self._read_values(hashes), self._config.timeout_s, self._reader)
        if values is None:
            self._failed_lookups += 1
            return {}
        return self._roster.leading_blocks(values, self._clock.now_s())

    async def join(self, worker_id: str, epoch: int) -> Membership:
        arguments: list[bytes | str | int] = [worker_id, f"{epoch:020d}", round(self._config.lease_s * 1000)]
        replies = await self._write(lambda: self._run_scripts([(JOIN, self._roster_key, arguments)]))
        if replies is None:
            return Membership.NOT_JOINED
        incarnation, is_new = replies[0]
        self._roster = Roster()  # outdated by what was just written
        if not incarnation:
            return Membership.NOT_JOINED
        self._incarnations[worker_id] = incarnation
        return Membership.NEW if is_new else Membership.RENEWED

    async def update(self, worker_id: str, stored: Sequence[CachedBlock], evicted: Sequence[CachedBlock]) -> bool:
        if worker_id not in self._incarnations:
            return False
        is_written = await self._write(lambda: self._write_changes(worker_id, stored, evicted)) is True
        if is_written:
            self._refusals.succeeded()
        return is_written

    async def leave(self, worker_id: str) -> None:
        incarnation = self._incarnations.pop(worker_id, None)
        if incarnation is not None:
            await self._write(lambda: self._writer.hdel(self._roster_key, str(incarnation)))
            self._roster = Roster()

    def status(self) -> IndexStatus:
        """A server that answers and refuses one write after another is not up: what it knows goes stale."""
        telling = self._breaker if self._refusals.state == "up" else self._refusals
        return IndexStatus(
            backend="redis",
            state=telling.state,
            state_since_s=telling.state_since_s,
            lookups=self._lookups,
            failed_lookups=self._failed_lookups,
            skipped_lookups=self._skipped_lookups,
            last_error=self._last_error,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._reader.aclose()
        await self._writer.aclose()

    # ---- guarding

    async def _write(self, work: Callable[[], Awaitable[T]]) -> T | None:
        return await self._attempt(work, WRITE_DEADLINE_S, self._writer) if self._breaker.allows() else None

    async def _attempt(self, work: Callable[[], Awaitable[T]], deadline_s: float, client: Redis) -> T | None:
        """What ``work`` returns, or None when the backend does not answer in time or refuses."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._check_version(client)
                answer = await work()
        except (RedisError, OSError, TimeoutError) as error:
            self._note_failure(error, client)
            return None
        self._breaker.succeeded()
        return answer

    def _note_failure(self, error: Exception, client: Redis) -> None:
        words = f"{type(error).__name__}: {error}"
        if words != self._last_error:
            _logger.warning("the prefix index cannot be used: %s", words)
        self._last_error = words
        if isinstance(error, ResponseError):  # such as out of memory or read-only: it is there, and says no
            self._breaker.succeeded()
            if client is self._writer:
                self._refusals.failed()
        else:
            self._is_version_checked = False  # whoever answers next may be another server
            self._breaker.failed()

    async def _check_version(self, client: Redis) -> None:
        """Once for each server. Raises ``ServerTooOld``."""
        if self._is_version_checked:
            return
        try:
            told = await client.info("server")
        except NoPermissionError:  # then the writes show what it cannot do
            told = {}
        reason = why_too_old(str(told.get("redis_version", "")))
        if reason is not None:
            raise ServerTooOld(f"{reason}; give another one with index.url")
        self._is_version_checked = True

    # ---- talking to the server

    @property
    def _roster_key(self) -> str:
        return f"kv:roster:{self._namespace}"

    def _root_key(self, root: BlockHash) -> str:
        # The braces make the root alone choose the shard of a cluster.
        return f"kv:{{{root.hex()}}}:{self._namespace}"

    async def _read_values(self, hashes: Sequence[BlockHash]) -> list[bytes | None]:
        pipeline = self._reader.pipeline(transaction=False)
        pipeline.hmget(self._root_key(hashes[0]), list(hashes))
        is_fresh = self._clock.now_s() - self._roster.read_s < self._roster_max_age_s
        replies = await (pipeline.execute() if is_fresh else self._execute_with_roster(pipeline))
        values: list[bytes | None] = replies[0]
        return values

    async def _execute_with_roster(self, pipeline: Pipeline) -> list[Any]:
        """The pipeline's replies; the roster comes in the same round trip."""
        pipeline.hgetall(self._roster_key)
        pipeline.time()
        *replies, rows, server_time = await pipeline.execute()
        self._roster = Roster.parse(rows, server_time, self._clock.now_s())
        return replies

    async def _write_changes(
        self, worker_id: str, stored: Sequence[CachedBlock], evicted: Sequence[CachedBlock]
    ) -> bool:
        incarnation = self._incarnations[worker_id]
        await self._execute_with_roster(self._writer.pipeline(transaction=False))
        roster = self._roster
        if not roster.belongs_to(worker_id, incarnation, roster.read_s):
            return False
        common: list[bytes | str | int] = [
            pack_incarnations([incarnation]),
            pack_incarnations(list(roster.members)),
            roster.newest,
            self._config.entry_ttl_s,
        ]
        await self._run_scripts(
            [
                (UPDATE, self._root_key(root), [*common, len(kept), *kept, *dropped])
                for root, kept, dropped in _changes_by_root(stored, evicted)
            ]
        )
        return True

    async def _run_scripts(self, calls: Sequence[ScriptCall]) -> list[Any]:
        """Replies of all calls in one round trip; raises the first error. A server that restarted gets the scripts
        again, and then all the calls: they do no harm twice."""
        replies = await self._send(calls)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            for script in ALL_SCRIPTS:
                await self._writer.script_load(script.text)
            replies = await self._send(calls)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def _send(self, calls: Sequence[ScriptCall]) -> list[Any]:
        pipeline = self._writer.pipeline(transaction=False)
        for script, key, arguments in calls:
            pipeline.evalsha(script.sha, 1, key, *arguments)
        return await pipeline.execute(raise_on_error=False)


def _connect(url: str | None, timeout_s: float) -> Redis:
    """A client that never retries by itself (the library's default retries for seconds) and speaks RESP2, which
    needs no greeting."""
    try:
        pool = BlockingConnectionPool.from_url(
            url or "",
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=None,
        )
    except ValueError as error:
        raise ConfigError("index.url", url, f"{error}") from None
    return Redis.from_pool(pool)


def _changes_by_root(
    stored: Iterable[CachedBlock], evicted: Iterable[CachedBlock]
) -> list[tuple[BlockHash, list[BlockHash], list[BlockHash]]]:
    """(root, stored, evicted) in pieces of at most ``FIELDS_PER_SCRIPT`` blocks."""
    changes: defaultdict[BlockHash, dict[BlockHash, bool]] = defaultdict(dict)
    for is_stored, blocks in ((False, evicted), (True, stored)):
        for block in blocks:
            changes[block.root][block.hash] = is_stored
    pieces = []
    for root, blocks_of_root in changes.items():
        hashes = list(blocks_of_root)
        for start in range(0, len(hashes), FIELDS_PER_SCRIPT):
            piece = hashes[start : start + FIELDS_PER_SCRIPT]
            kept = [block for block in piece if blocks_of_root[block]]
            pieces.append((root, kept, [block for block in piece if not blocks_of_root[block]]))
    return pieces
