"""A coordinator over workers that a script drives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from eagleray.core.clock import ManualClock
from eagleray.core.config import RouterConfig
from eagleray.core.messages import TokenOutput
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import Role
from eagleray.core.telemetry import PhaseClock, TimeAccount
from eagleray.router.coordinator import Coordinator
from eagleray.router.fake_workers import FakeWorker, FakeWorkerPool, fake_welcome
from eagleray.router.generation import RoutedGeneration
from eagleray.router.metrics import IngressMetrics
from eagleray.router.pending import Load
from eagleray.router.prefix_index.memory import MemoryPrefixIndex
from eagleray.router.view import ClusterView, Route, RoutingRequest

PROMPT = tuple(range(1, 13))
LOOP_TURNS = 1000


class FirstInOrder:
    """The first decode worker, and the first prefill worker unless there is none: no surprises for a script."""

    def choose(self, request: RoutingRequest, view: ClusterView) -> Route | None:
        if not view.decode:
            return None
        return Route(min(view.decode), min(view.prefill, default=None), "first in order")


class Records:
    """A ``RequestTracer`` that keeps what it was told."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, TimeAccount]] = []

    def record(self, spec: RequestSpec, phases: PhaseClock, account: TimeAccount, outcome: str) -> None:
        self.ends.append((outcome, account))

    def close(self) -> None:
        raise AssertionError("a request closes no tracer")


class Stage:
    """A coordinator over fake workers: d1, d2 decode; p1, p2 prefill."""

    def __init__(self, *, with_prefill: bool = True, **config: object) -> None:
        self.clock = ManualClock(100.0)
        self.d1, self.d2 = (FakeWorker(fake_welcome(name, Role.DECODE)) for name in ("d1", "d2"))
        self.p1, self.p2 = (FakeWorker(fake_welcome(name, Role.PREFILL)) for name in ("p1", "p2"))
        self.workers = [self.d1, self.d2, *([self.p1, self.p2] if with_prefill else [])]
        self.pool = FakeWorkerPool(self.clock, *self.workers)
        self.records = Records()
        self.coordinator = Coordinator(
            self.pool, FirstInOrder(), MemoryPrefixIndex(self.clock, 10.0),
            RouterConfig(**{"queue_deadline_s": 8.0, **config}), self.clock, IngressMetrics("fake"), self.records,
        )  # fmt: skip

    def start(self, already_s: float = 0.0, **sampling: object) -> Answering:
        spec = RequestSpec(
            request_id="a",
            token_ids=PROMPT,
            num_prompt_tokens=len(PROMPT),
            sampling=SamplingParams(**{"max_tokens": 50, **sampling}),
        )
        return Answering(self.coordinator.generate(spec, already_s))

    def pending_on(self, worker: FakeWorker) -> Load:
        return self.coordinator.pending.on(worker.welcome.worker_id, worker.snapshot)

    def assert_nothing_is_left(self) -> None:
        assert [worker.open_requests for worker in self.workers] == [[]] * len(self.workers)
        assert (self.coordinator.num_queued, self.coordinator.num_running) == (0, 0)
        assert [self.pending_on(worker) for worker in self.workers] == [Load()] * len(self.workers)
        assert self.pool.num_waits == 0


class Answering:
    """A generation that a task iterates over."""

    def __init__(self, generation: RoutedGeneration) -> None:
        self.generation = generation
        self.outputs: list[TokenOutput] = []
        self.task = asyncio.create_task(self._collect())

    async def _collect(self) -> None:
        async for output in self.generation:
            self.outputs.append(output)

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    async def end(self) -> None:
        await asyncio.wait_for(self.task, 5)


async def until(holds: Callable[[], object]) -> None:
    """Let the event loop turn until it holds."""
    for _ in range(LOOP_TURNS):
        if holds():
            return
        await asyncio.sleep(0)
    raise AssertionError(f"does not come to hold within {LOOP_TURNS} turns of the event loop")


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    stage.assert_nothing_is_left()


@pytest.fixture
async def aggregated() -> AsyncIterator[Stage]:
    """No prefill pool."""
    stage = Stage(with_prefill=False)
    yield stage
    stage.assert_nothing_is_left()


@pytest.fixture
def new_stage() -> type[Stage]:
    """For a stage of other settings, or one that a test leaves dirty."""
    return Stage


@pytest.fixture(name="until")
def until_fixture() -> Callable[[Callable[[], object]], Awaitable[None]]:
    return until
