"""Real workers in one process whose engines fail or whose transfers hang while requests come and go."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from eagleray.cluster.local import LocalCluster
from eagleray.core.config import PoolConfig, parse_config
from eagleray.core.errors import ServiceUnavailable
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.engine.execution.fake import FakeExecutor, FakeStep
from eagleray.engine.scheduling.plan import StepPlan
from eagleray.kv_transfer.transport import BlockStore, Transport
from eagleray.kv_transfer.transports.loopback import Fault, LoopbackTransport, no_fault
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText

TOKENIZER = byte_tokenizer()
ALONE = FakeExecutor(max_model_tokens=512)
SETTLE_DEADLINE_S = 5.0


class TroubledExecutor:
    """The fake, but it fails at step ``fail_at_step`` and waits before each step for ``may_step``."""

    def __init__(self) -> None:
        self._executor = FakeExecutor(num_blocks=64, max_model_tokens=512)
        self._num_steps = 0
        self.fail_at_step: int | None = None
        self.may_step = threading.Event()
        self.may_step.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def submit(self, plan: StepPlan) -> FakeStep:
        assert self.may_step.wait(SETTLE_DEADLINE_S)
        self._num_steps += 1
        if self._num_steps == self.fail_at_step:
            raise RuntimeError("the device is gone")
        return self._executor.submit(plan)


class Gate:
    """A transfer fault: holds the copy of a block until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.may_pass = threading.Event()

    def __call__(self, slot: int, views: Sequence[memoryview]) -> None:
        self.reached.set()
        assert self.may_pass.wait(SETTLE_DEADLINE_S)


class Pair:
    """One prefill and one decode worker, unless told otherwise, and a way to trouble them."""

    def __init__(self, fault: Fault = no_fault) -> None:
        self.executors: dict[Role, list[TroubledExecutor]] = {Role.PREFILL: [], Role.DECODE: []}
        engine = {"max_num_seqs": 31, "max_num_batched_tokens": 32, "num_blocks": 64}
        config = parse_config(
            {
                "prefill": {"replicas": 1, "engine": engine},
                "decode": {"replicas": 1, "engine": engine},
                "router": {"local_prefill_tokens": 0},
                "transfer": {"transports": ["loopback"]},
            }
        )

        def new_executor(role: Role, pool: PoolConfig) -> TroubledExecutor:
            executor = TroubledExecutor()
            self.executors[role].append(executor)
            return executor

        def new_transports(names: Sequence[str], stores: Mapping[str, BlockStore]) -> list[Transport]:
            return [LoopbackTransport(stores, fault)]

        self.cluster = LocalCluster(
            config, new_executor, lambda spec: OutputText(TOKENIZER, spec.sampling, ()), new_transports
        )

    @property
    def prefill(self) -> TroubledExecutor:
        return self.executors[Role.PREFILL][0]

    @property
    def decode(self) -> TroubledExecutor:
        return self.executors[Role.DECODE][0]

    async def until(self, role: Role, holds: Callable[[WorkerSnapshot], bool]) -> None:
        """Until the snapshots of all connected workers of a role hold."""
        pool = self.cluster.coordinator.pool
        async with asyncio.timeout(SETTLE_DEADLINE_S):
            while not all(holds(c.snapshot) for c in pool.workers().values() if c.welcome.role is role):
                await pool.wait_for_change(0.5)

    async def assert_nothing_is_left(self) -> None:
        for role in Role:
            await self.until(role, lambda snapshot: snapshot.blocks_free == snapshot.blocks_total)
        for worker in self.cluster.workers.values():
            if worker.is_healthy:
                await asyncio.to_thread(worker.check_integrity)


def new_spec(name: str = "a", max_tokens: int = 10) -> RequestSpec:
    prompt = tuple(random.Random(name).choices(range(250), k=100))
    sampling = SamplingParams(max_tokens=max_tokens, seed=3, ignore_eos=True)
    return RequestSpec(request_id=name, token_ids=prompt, num_prompt_tokens=100, sampling=sampling)


async def tokens_of(pair: Pair, spec: RequestSpec) -> list[int]:
    return [token async for output in pair.cluster.coordinator.generate(spec) for token in output.token_ids]


@pytest.mark.parametrize("fail_at_step", [1, 3, 4])
async def test_a_prefill_engine_that_fails_is_made_up_for_by_the_decode_worker(fail_at_step: int) -> None:
    """Its source is alive and would keep the reader waiting; the prompt takes four steps."""
    pair = Pair()
    async with pair.cluster:
        pair.prefill.fail_at_step = fail_at_step
        answer = await asyncio.wait_for(tokens_of(pair, new_spec()), SETTLE_DEADLINE_S)
        assert answer == ALONE.continuation(new_spec(), 10)
        assert sum(not worker.is_healthy for worker in pair.cluster.workers.values()) == 1
        await pair.assert_nothing_is_left()


async def test_a_decode_engine_that_fails_mid_stream_is_replaced_by_a_worker_that_joins() -> None:
    pair = Pair()
    async with pair.cluster:
        pair.decode.fail_at_step = 5
        answering = asyncio.create_task(tokens_of(pair, new_spec()))
        broken = next(worker for worker in pair.cluster.workers.values() if worker.role is Role.DECODE)
        async with asyncio.timeout(SETTLE_DEADLINE_S):
            while broken.is_healthy:
                await pair.cluster.coordinator.pool.wait_for_change(0.1)
        pair.cluster.start_worker(Role.DECODE)
        assert await asyncio.wait_for(answering, SETTLE_DEADLINE_S) == ALONE.continuation(new_spec(), 10)
        await pair.assert_nothing_is_left()


async def test_a_request_that_breaks_every_engine_leaves_those_beyond_max_attempts_alone() -> None:
    config = parse_config({"prefill": {"replicas": 0}, "decode": {"replicas": 4}, "router": {"max_attempts": 2}})
    executors: list[TroubledExecutor] = []

    def new_executor(role: Role, pool: PoolConfig) -> TroubledExecutor:
        executors.append(TroubledExecutor())
        executors[-1].fail_at_step = 2  # after the first token
        return executors[-1]

    async with LocalCluster(config, new_executor, lambda spec: OutputText(TOKENIZER, spec.sampling, ())) as cluster:
        tokens: list[int] = []
        with pytest.raises(ServiceUnavailable, match="2 workers failed"):
            async for output in cluster.coordinator.generate(new_spec()):
                tokens.extend(output.token_ids)
        assert tokens == ALONE.continuation(new_spec(), 2)
        assert [worker.is_healthy for worker in cluster.workers.values()].count(False) == 2


async def test_a_hang_up_while_the_prompt_is_computed_frees_both_sides() -> None:
    pair = Pair()
    async with pair.cluster:
        pair.prefill.may_step.clear()
        generation = pair.cluster.coordinator.generate(new_spec())
        first = asyncio.ensure_future(anext(aiter(generation)))
        await pair.until(Role.DECODE, lambda snapshot: snapshot.num_reserved == 1)
        await generation.aclose()
        pair.prefill.may_step.set()
        await asyncio.wait([first], timeout=SETTLE_DEADLINE_S)
        await pair.assert_nothing_is_left()


async def test_a_hang_up_while_a_block_is_copied_frees_nothing_before_the_copy_has_ended() -> None:
    gate = Gate()
    pair = Pair(fault=gate)
    async with pair.cluster:
        placed: dict[str, str] = {}
        pair.cluster.coordinator.on_placed = placed.__setitem__
        generation = pair.cluster.coordinator.generate(new_spec())
        outputs = aiter(generation)  # held on to: an iterator that is dropped closes the generation
        assert (await anext(outputs)).position == 0
        assert await asyncio.to_thread(gate.reached.wait, SETTLE_DEADLINE_S)
        await generation.aclose()
        decode = next(worker for worker in pair.cluster.workers.values() if worker.role is Role.DECODE)
        await pair.until(Role.DECODE, lambda snapshot: not decode.serves(placed[decode.worker_id]))
        await asyncio.to_thread(decode.check_integrity)
        await pair.until(Role.DECODE, lambda snapshot: snapshot.num_reserved == 1 and snapshot.blocks_free < 64)
        gate.may_pass.set()
        await pair.assert_nothing_is_left()


async def test_a_hang_up_while_the_decode_worker_cannot_settle_a_finished_pull_leaves_nothing() -> None:
    pair = Pair()
    async with pair.cluster:
        pair.decode.may_step.clear()
        generation = pair.cluster.coordinator.generate(new_spec("blocker", 30))
        outputs = aiter(generation)
        await anext(outputs)  # said by the prefill worker; the decode worker's step thread hangs soon after
        another = pair.cluster.coordinator.generate(new_spec())
        waiting = asyncio.ensure_future(anext(aiter(another)))
        await pair.cluster.coordinator.pool.wait_for_change(0.3)
        await another.aclose()
        pair.decode.may_step.set()
        await asyncio.wait([waiting], timeout=SETTLE_DEADLINE_S)
        await generation.aclose()
        await pair.assert_nothing_is_left()


async def test_stopping_a_worker_is_no_failure_of_its_engine() -> None:
    pair = Pair()
    async with pair.cluster:
        workers = list(pair.cluster.workers.values())
        answering = asyncio.ensure_future(tokens_of(pair, new_spec("long", 300)))
        await pair.until(Role.DECODE, lambda snapshot: snapshot.num_running == 1 or snapshot.output_tokens_total > 0)
        answering.cancel()
        await asyncio.wait([answering])
    assert [worker.failure for worker in workers] == [None, None]
