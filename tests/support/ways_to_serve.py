"""Every way to serve requests, with and without guesses: by one engine, or by prefill and decode workers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from served_requests import (
    BLOCK_SIZE_TOKENS,
    NUM_NEW_TOKENS,
    Checkpoints,
    Hold,
    Records,
    Served,
    Tokens,
    specs,
)

from eagleray.cluster.local import LocalCluster
from eagleray.core.clock import SystemClock
from eagleray.core.config import Config, ModelConfigSection, PoolConfig, parse_config
from eagleray.core.errors import TransferError
from eagleray.core.messages import TokenOutput
from eagleray.core.request import RequestSpec
from eagleray.core.snapshot import Role
from eagleray.engine.engine import Engine
from eagleray.engine.execution.executor import LocalExecutor, build_executor
from eagleray.engine.speculation.build import build_draft_policy
from eagleray.engine.speculation.controller import DraftPolicy, StepTimes
from eagleray.engine.speculation.tree import DraftShape
from eagleray.kv_transfer.transport import BlockStore
from eagleray.kv_transfer.transports.loopback import LoopbackTransport
from eagleray.kv_transfer.transports.select import make_transports
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText
from eagleray.workers.build import WorkerExecutor

TOKENIZER = byte_tokenizer()
WithPolicy = Callable[[DraftPolicy], DraftPolicy]


def as_it_is(policy: DraftPolicy) -> DraftPolicy:
    return policy


@contextmanager
def running_engine(
    checkpoints: Checkpoints,
    speculation: Mapping[str, Any] | None,
    records: Records,
    with_policy: WithPolicy = as_it_is,
    **changes: Any,
) -> Iterator[Engine]:
    settings = {"block_size_tokens": BLOCK_SIZE_TOKENS, "num_blocks": 256, "max_num_batched_tokens": 1024}
    pools = {"prefill": {"replicas": 0}, "decode": {"engine": settings | changes}}
    config = parse_config({"speculation": speculation, **pools})
    executor = build_executor(
        ModelConfigSection(path=str(checkpoints.target)),
        config.decode.engine,
        num_threads=1,
        speculation=config.speculation,
    )
    policy = with_policy(build_draft_policy(config.speculation, executor.has_draft_network))
    yield Engine(records.follow(executor), config.decode.engine, SystemClock(), new_text, policy)
    executor.close()


class SeldomDrafts:
    """Implements ``DraftPolicy``: guesses in two steps of eleven; between them a draft model's KV waits."""

    def __init__(self, always: DraftPolicy) -> None:
        self.slots_needed, self.note_acceptance = always.slots_needed, always.note_acceptance
        self.note_times, self.may_defer = always.note_times, always.may_defer
        self._always = always
        self._num_steps = 0

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        self._num_steps += 1
        return self._always.choose(num_decoding, max_rows) if self._num_steps % 11 < 2 else None


class EvenTimes:
    """Implements ``DraftPolicy``: a controller that is told that all steps take as long. So on any machine it begins
    without guesses, and guesses more once it has seen what that costs."""

    def __init__(self, controller: DraftPolicy) -> None:
        self.slots_needed, self.note_acceptance = controller.slots_needed, controller.note_acceptance
        self.choose, self.may_defer = controller.choose, controller.may_defer
        self._controller = controller

    def note_times(self, times: StepTimes) -> int:
        return self._controller.note_times(even(times))


def even(times: StepTimes) -> StepTimes:
    return msgspec.structs.replace(times, verify_s=1e-3, draft_s=1e-4, outside_s=0.0)


def new_text(spec: RequestSpec) -> OutputText:
    return OutputText(TOKENIZER, spec.sampling, spec.token_ids)


def tokens_of(engine: Engine, requests: Iterable[RequestSpec]) -> Tokens:
    return _joined(outputs_of(engine, requests))


def outputs_of(engine: Engine, requests: Iterable[RequestSpec]) -> list[TokenOutput]:
    for spec in requests:
        engine.add(spec)
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += engine.step().outputs
    engine.check_integrity()
    return outputs


def _joined(outputs: Iterable[TokenOutput]) -> Tokens:
    tokens: Tokens = {}
    for output in outputs:
        tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


@dataclass(frozen=True)
class Shown:
    """What an engine shows of how it served."""

    preemptions: int
    evicted_blocks: int  # that cannot be found any more
    swapped_blocks: int  # these two of the last round
    cached_tokens: int


def serve_offline(
    checkpoints: Checkpoints,
    speculation: Mapping[str, Any],
    expect: Callable[[Shown], bool] = lambda shown: shown.preemptions == 0,
    rounds: int = 1,
    num_new_tokens: int = NUM_NEW_TOKENS,
    **changes: Any,
) -> Served:
    """The last of ``rounds``, in which the requests come again to an engine that has cached their blocks."""
    records = Records()
    with running_engine(checkpoints, speculation, records, **changes) as engine:
        for _ in range(rounds):
            records.clear()
            outputs = outputs_of(engine, specs(num_new_tokens))
        shown = Shown(
            engine.scheduler.num_preemptions,
            len(engine.drain_cache_changes()[1]),
            records.num_swapped,
            sum(output.num_cached_tokens or 0 for output in outputs),
        )
    assert expect(shown), shown
    return Served(_joined(outputs), records)


ENGINE = {"block_size_tokens": BLOCK_SIZE_TOKENS, "num_blocks": 256, "max_num_seqs": 63, "max_num_batched_tokens": 64}
CLUSTER: Mapping[str, Any] = {
    "prefill": {"replicas": 1, "engine": ENGINE | {"max_num_batched_tokens": 16}},
    "decode": {"replicas": 1, "engine": ENGINE},
    "router": {"local_prefill_tokens": 4, "stall_deadline_s": 30.0, "submit_deadline_s": 30.0},
}


@dataclass(frozen=True)
class Trace:
    """What a cluster shows of how it served."""

    moved_bytes: int
    lost_transfers: int
    cached_tokens: int
    attempts: Sequence[int]


def serve_cluster(
    checkpoints: Checkpoints,
    speculation: Mapping[str, Any],
    expect: Callable[[Trace], bool],
    *,
    rounds: int = 1,
    num_new_tokens: int = NUM_NEW_TOKENS,
    requests: Sequence[RequestSpec] = (),
    every_nth_block_breaks: int = 0,
    kill: Role | None = None,
    kill_after: int = 1,
    with_policy: WithPolicy = as_it_is,
    **changes: Any,
) -> Served:
    """The last of ``rounds``; ``kill`` stops a worker of that role when it has begun to answer, a decode worker when it
    has brought one of its requests beyond ``kill_after`` tokens. There all decode workers wait until it is gone:
    however late that is, it comes in the middle. Without ``requests`` the usual ones are asked."""
    requests = requests or specs(num_new_tokens)
    config = parse_config({**CLUSTER, "speculation": speculation, **changes})
    records = Records()
    hold = Hold(kill_after + 1) if kill is Role.DECODE else None

    def new_policy(executor: WorkerExecutor) -> DraftPolicy:
        return with_policy(build_draft_policy(config.speculation, executor.has_draft_network))

    async def serve() -> Tokens:
        with closing_executors(checkpoints, config, records, hold=hold) as new_executor:
            transports = partial(breaking, every_nth_block_breaks) if every_nth_block_breaks else make_transports
            async with LocalCluster(config, new_executor, new_text, transports, new_policy) as cluster:
                placed: dict[tuple[Role, str], str] = {}  # workers, by role and index of the request
                cluster.coordinator.on_placed = lambda worker_id, attempt_id: placed.update(
                    {(Role(worker_id.partition("-")[0]), attempt_id.partition(".")[0]): worker_id}
                )
                for _ in range(rounds):
                    records.clear()
                    begun: Begun = {role: asyncio.get_running_loop().create_future() for role in Role}
                    tasks = [asyncio.create_task(follow(cluster, spec, begun, kill_after)) for spec in requests]
                    if kill is not None:
                        await stop(
                            cluster, placed[kill, await asyncio.wait_for(begun[kill], 30)], hold and hold.released
                        )
                    answers = await asyncio.gather(*tasks)
                await wait_until(cluster, expect, [attempts for _, attempts in answers])
        return {spec.request_id: tokens for spec, (tokens, _) in zip(requests, answers, strict=True)}

    return Served(asyncio.run(serve()), records)


@contextmanager
def closing_executors(
    checkpoints: Checkpoints,
    config: Config,
    records: Records,
    speculation: Mapping[Role, Mapping[str, Any] | None] | None = None,  # of roles that do not keep to the config
    hold: Hold | None = None,
) -> Iterator[Callable[[Role, PoolConfig], LocalExecutor]]:
    executors: list[LocalExecutor] = []

    def new_executor(role: Role, pool: PoolConfig) -> LocalExecutor:
        model, guesses = ModelConfigSection(path=str(checkpoints.target)), config.speculation
        if role in (speculation or {}):
            guesses = parse_config({"speculation": (speculation or {})[role]}).speculation
        executor = build_executor(model, pool.engine, num_threads=1, shared_kv=True, speculation=guesses)
        executors.append(records.follow(executor, hold))
        return executor

    yield new_executor
    for executor in executors:
        executor.close()


def breaking(every_nth: int, names: Sequence[str], stores: Mapping[str, BlockStore]) -> list[LoopbackTransport]:
    count = 0

    def fault(slot: int, views: Sequence[memoryview]) -> None:
        nonlocal count
        count += 1
        if count % every_nth == 0:
            raise TransferError("the connection broke")

    return [LoopbackTransport(stores, fault)]


async def stop(cluster: LocalCluster, worker_id: str, released: threading.Event | None) -> None:
    """Who is held goes on when the router cannot hear the worker any more."""
    client = cluster.coordinator.pool.workers()[worker_id]
    stopping = asyncio.create_task(cluster.stop_worker(worker_id))
    await client.wait_lost(30)
    assert client.is_lost
    if released is not None:
        released.set()
    await stopping


Begun = Mapping[Role, asyncio.Future[str]]  # the request of which a worker of the role has told first


async def follow(cluster: LocalCluster, spec: RequestSpec, begun: Begun, num_decoded: int) -> tuple[list[int], int]:
    """(tokens, attempts). Decode workers have begun when there are more than ``num_decoded`` tokens."""
    generation = cluster.coordinator.generate(spec)
    tokens: list[int] = []
    async for output in generation:
        tokens += output.token_ids
        for role, num_before in ((Role.PREFILL, 0), (Role.DECODE, num_decoded)):
            if not begun[role].done() and len(tokens) > num_before:  # who is late gets many in one output
                begun[role].set_result(spec.request_id)
    assert generation.account is not None
    return tokens, generation.account.attempts


async def wait_until(cluster: LocalCluster, expect: Callable[[Trace], bool], attempts: Sequence[int]) -> None:
    """Until all blocks are free and snapshots tell what is expected."""
    pool, deadline_s = cluster.coordinator.pool, cluster.clock.now_s() + 10
    while True:
        seen = [client.snapshot for client in pool.workers().values()]
        trace = Trace(
            sum(snapshot.transfer_bytes_total for snapshot in seen),
            sum(snapshot.transfer_failures_total for snapshot in seen),
            sum(snapshot.cached_tokens_total for snapshot in seen),
            attempts,
        )
        if expect(trace) and all(snapshot.blocks_free == snapshot.blocks_total for snapshot in seen):
            return
        assert cluster.clock.now_s() < deadline_s, trace
        await pool.wait_for_change(0.2)


split = partial(serve_cluster, expect=lambda trace: trace.moved_bytes > 0 == trace.lost_transfers)
hit = partial(serve_offline, expect=lambda shown: shown.preemptions == 0 < shown.cached_tokens)
preempted = partial(serve_offline, num_blocks=24, watermark=0.0, expect=lambda shown: shown.preemptions > 2)
evicted = partial(preempted, expect=lambda shown: shown.preemptions > 2 and shown.evicted_blocks > 0)
swapped = partial(
    preempted, num_host_blocks=128, expect=lambda shown: shown.preemptions > 2 and shown.swapped_blocks > 0
)
SLOW_PREFILL = {"prefill": {"replicas": 1, "engine": ENGINE | {"max_num_batched_tokens": 2}}}
TWO_DECODERS = {"decode": {"replicas": 2, "engine": ENGINE}, "router": {**CLUSTER["router"], "policy": "round_robin"}}
WAYS: Mapping[str, Callable[..., Served]] = {
    "aggregated": serve_offline,
    "one by one": partial(serve_offline, max_num_seqs=1),
    "chunks": partial(serve_offline, max_num_seqs=12, max_num_batched_tokens=13),
    "prefix hit": partial(hit, rounds=2),
    "preempted by recompute": partial(preempted, enable_prefix_caching=False),
    "preempted by recompute, with a cache": evicted,
    "preempted by swap": swapped,
    "guessed for now and then": partial(serve_offline, with_policy=SeldomDrafts),
    "guessed for now and then, prefix hit": partial(hit, with_policy=SeldomDrafts, rounds=3),
    "guessed for now and then, preempted by recompute": partial(evicted, with_policy=SeldomDrafts),
    "guessed for now and then, preempted by swap": partial(swapped, with_policy=SeldomDrafts),
    "split over shared memory": partial(split, transfer={"transports": ["shared_memory"]}),
    "split over tcp": partial(split, transfer={"transports": ["tcp"]}),
    "split over loopback": partial(split, transfer={"transports": ["loopback"]}),
    "split, prefix hit": partial(split, rounds=2, expect=lambda trace: trace.cached_tokens > 0),
    "transfers break": partial(serve_cluster, every_nth_block_breaks=3, expect=lambda trace: trace.lost_transfers > 0),
    "prefill worker dies": partial(
        serve_cluster, kill=Role.PREFILL, expect=lambda trace: trace.lost_transfers > 0, **SLOW_PREFILL
    ),
    "decode worker dies": partial(
        serve_cluster, kill=Role.DECODE, expect=lambda trace: max(trace.attempts) > 1, **TWO_DECODERS
    ),
}
