"""A request's way over workers that a script drives: order, losses, refusals, deadlines, hang-ups. No engine, no
socket, and a clock that moves when told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from eagleray.core.clock import ManualClock
from eagleray.core.config import RouterConfig
from eagleray.core.errors import EagleRayError, InvalidRequest, Overloaded, ServiceUnavailable, WorkerLost
from eagleray.core.messages import RefusalKind, RequestTiming, TokenOutput
from eagleray.core.request import FinishReason, RequestSpec
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
LENGTH = FinishReason.LENGTH
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

    def start(self, **sampling: object) -> Answering:
        spec = RequestSpec(
            request_id="a",
            token_ids=PROMPT,
            num_prompt_tokens=len(PROMPT),
            sampling=SamplingParams(**{"max_tokens": 50, **sampling}),
        )
        return Answering(self.coordinator.generate(spec))

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


# ---- placing


async def test_the_decode_worker_reserves_before_the_prefill_worker_hears_of_the_request(stage: Stage) -> None:
    stage.d1.may_reply.clear()
    answering = stage.start()
    await until(lambda: stage.d1.submits)
    assert stage.p1.submits == []
    stage.d1.may_reply.set()
    await until(lambda: stage.p1.open_requests)
    [reservation], [prefill] = stage.d1.submits, stage.p1.submits
    assert reservation.pull_from == stage.p1.welcome.region and not reservation.hand_over
    assert prefill.hand_over and prefill.pull_from is None
    assert prefill.spec == reservation.spec and prefill.spec.token_ids == PROMPT
    await answering.generation.aclose()
    await answering.end()


@pytest.mark.parametrize("kind", [RefusalKind.NO_ROOM, RefusalKind.DRAINING])
async def test_a_refusal_moves_on_to_the_next_worker(stage: Stage, kind: RefusalKind) -> None:
    stage.d1.replies.append(kind)
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    assert len(stage.d2.open_requests) == 1 and stage.d1.open_requests == []
    stage.p1.say(0, 100)
    stage.d2.say(1, 101, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100, 101]
    assert answering.generation.account is not None
    assert (answering.generation.account.decode_worker, answering.generation.account.attempts) == ("d2", 1)


async def test_a_prefill_worker_that_refuses_gives_the_reservation_back_and_another_pair_is_found(stage: Stage) -> None:
    stage.p1.replies.append(RefusalKind.NO_ROOM)
    answering = stage.start()
    await until(lambda: stage.p2.open_requests)
    first, second = stage.d1.submits
    assert stage.d1.aborts == [first.spec.request_id]
    assert stage.d1.open_requests == [second.spec.request_id]
    assert second.pull_from == stage.p2.welcome.region
    await answering.generation.aclose()
    await answering.end()


async def test_a_worker_that_does_not_answer_a_submit_is_passed_over(stage: Stage) -> None:
    stage.d1.replies.append(WorkerLost("d1", "no answer to a submit in 5 s"))
    answering = stage.start()
    await until(lambda: stage.d2.open_requests)
    await answering.generation.aclose()
    await answering.end()


async def test_an_invalid_request_is_the_users_affair_and_tried_nowhere_else(stage: Stage) -> None:
    stage.d1.replies.append(RefusalKind.INVALID)
    answering = stage.start()
    with pytest.raises(InvalidRequest, match="invalid, says the script"):
        await answering.end()
    assert stage.d2.submits == []
    [(outcome, account)] = stage.records.ends
    assert outcome == "error" and account.decode_worker is None


async def test_a_request_refused_by_all_waits_for_a_change_and_does_not_spin(aggregated: Stage) -> None:
    for worker in (aggregated.d1, aggregated.d2):
        worker.replies.extend([RefusalKind.NO_ROOM] * 2)
    answering = aggregated.start()
    await until(lambda: aggregated.pool.num_waits)
    for _ in range(50):
        await asyncio.sleep(0)
    assert (len(aggregated.d1.submits), len(aggregated.d2.submits)) == (1, 1)
    aggregated.pool.change()
    await until(lambda: len(aggregated.d2.submits) == 2 and aggregated.pool.num_waits)
    aggregated.pool.change()
    await until(lambda: aggregated.d1.open_requests)
    aggregated.d1.say(0, 100, finish=LENGTH)
    await answering.end()
    names = [submit.spec.request_id for worker in aggregated.workers for submit in worker.submits]
    assert len(set(names)) == len(names) == 5


async def test_a_request_that_finds_no_worker_fails_at_the_queue_deadline_saying_why(aggregated: Stage) -> None:
    for worker in (aggregated.d1, aggregated.d2):
        worker.replies.append(RefusalKind.NO_ROOM)
    answering = aggregated.start()
    await until(lambda: aggregated.pool.num_waits)
    assert aggregated.coordinator.num_queued == 1
    for worker in (aggregated.d1, aggregated.d2):
        worker.lose()
    aggregated.pool.advance(7.9)
    await asyncio.sleep(0)
    assert not answering.task.done()
    aggregated.pool.advance(0.2)
    with pytest.raises(ServiceUnavailable, match=r"in 8\.0 s: no_room, says the script"):
        await answering.end()
    account = answering.generation.account
    assert account is not None
    assert account.queue_s == account.total_s == pytest.approx(8.1)
    assert (account.prefill_worker, account.decode_worker, account.time_to_first_token_s) == (None, None, None)
    assert (account.num_output_tokens, account.attempts, account.route_reason) == (0, 1, "")


async def test_a_waiting_request_goes_to_a_worker_that_joins() -> None:
    stage = Stage(with_prefill=False)
    stage.d1.lose()
    stage.d2.lose()
    answering = stage.start()
    await until(lambda: stage.pool.num_waits)
    newcomer = FakeWorker(fake_welcome("d3", Role.DECODE))
    stage.pool.advance(3.0)
    stage.pool.join(newcomer)
    await until(lambda: newcomer.open_requests)
    newcomer.say(0, 100, finish=LENGTH)
    await answering.end()
    assert answering.generation.account is not None and answering.generation.account.queue_s == 3.0


async def test_more_waiting_requests_than_allowed_are_turned_away_with_a_time_to_come_back() -> None:
    stage = Stage(with_prefill=False, max_queued=2)
    stage.d1.lose()
    stage.d2.lose()
    waiting = [stage.start(), stage.start()]
    await until(lambda: stage.coordinator.num_queued == 2)
    with pytest.raises(Overloaded, match="2 requests are waiting") as refusal:
        stage.start()
    assert refusal.value.retry_after_s == 4.0
    for answering in waiting:
        await answering.generation.aclose()
        await answering.end()
    stage.assert_nothing_is_left()


# ---- tokens of two workers


async def test_a_second_token_that_comes_before_the_first_waits_for_it(stage: Stage) -> None:
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.d1.say(1, 101)
    await asyncio.sleep(0)
    stage.p1.say(0, 100)
    stage.d1.say(2, 102, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100, 101, 102]
    assert [output.position for output in answering.outputs] == [0, 1, 2]


async def test_a_first_token_that_both_workers_say_comes_once(stage: Stage) -> None:
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.d1.say(0, 100)
    stage.p1.say(0, 100)
    stage.d1.say(1, 101, 102, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100, 101, 102]


async def test_a_request_that_ends_with_its_first_token_gives_the_reservation_back(stage: Stage) -> None:
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.p1.say(0, 100, finish=FinishReason.STOP)
    await answering.end()
    assert answering.outputs[-1].finish_reason is FinishReason.STOP
    assert stage.d1.aborts == [stage.d1.submits[0].spec.request_id]


async def test_an_error_that_a_worker_reports_reaches_the_user(aggregated: Stage) -> None:
    answering = aggregated.start()
    await until(lambda: aggregated.d1.open_requests)
    aggregated.d1.say(0, finish=FinishReason.ERROR, error="the grammar cannot be compiled")
    with pytest.raises(EagleRayError, match="grammar"):
        await answering.end()
    assert aggregated.records.ends[0][0] == "error"


# ---- losses


async def test_a_lost_decode_worker_is_replaced_by_one_that_knows_all_tokens_so_far(stage: Stage) -> None:
    answering = stage.start(seed=5)
    await until(lambda: stage.p1.open_requests)
    stage.p1.say(0, 100)
    stage.d1.say(1, 101)
    stage.d1.lose()
    await until(lambda: len(stage.p1.submits) == 2)
    resumed = stage.d2.submits[0].spec
    assert resumed.token_ids == (*PROMPT, 100, 101)
    assert resumed.num_prompt_tokens == len(PROMPT)
    assert resumed.request_id != stage.d1.submits[0].spec.request_id
    stage.p1.say(2, 102)
    stage.d2.say(3, 103, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100, 101, 102, 103]
    account = answering.generation.account
    assert account is not None and (account.attempts, account.decode_worker) == (2, "d2")
    assert "eagleray_requests_resumed_total 1.0" in stage.coordinator.metrics_text()


async def test_tokens_that_a_lost_worker_said_out_of_order_are_not_known_to_the_next(stage: Stage) -> None:
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.d1.say(1, 101)
    stage.d1.lose()
    await until(lambda: stage.d2.submits)
    assert stage.d2.submits[0].spec.token_ids == PROMPT
    await until(lambda: stage.p1.open_requests == [stage.d2.submits[0].spec.request_id])
    stage.p1.say(0, 100)
    stage.d2.say(1, 101, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100, 101]


async def test_a_lost_prefill_worker_is_the_decode_workers_affair(stage: Stage) -> None:
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.p1.lose()
    await asyncio.sleep(0)
    stage.d1.say(0, 100)
    stage.d1.say(1, 101, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100, 101]
    assert answering.generation.account is not None and answering.generation.account.attempts == 1


@pytest.mark.parametrize("lost_first", [True, False])
async def test_a_first_token_that_was_lost_with_its_prefill_worker_is_computed_again(
    stage: Stage, lost_first: bool
) -> None:
    """The decode worker has it, from the last announcement, and goes on after it: nobody would ever say it."""
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    if lost_first:
        stage.p1.lose()
    stage.d1.say(1, 101)
    if not lost_first:
        stage.p1.lose()
    await until(lambda: stage.p2.open_requests)
    assert stage.d1.submits[1].spec.token_ids == PROMPT
    stage.p2.say(0, 100)
    stage.d1.say(1, 101, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100, 101]


async def test_a_request_that_every_worker_loses_fails_after_max_attempts() -> None:
    stage = Stage(with_prefill=False, max_attempts=3)
    answering = stage.start()
    for attempt in range(3):
        await until(lambda: stage.d1.open_requests)
        stage.d1.say(attempt, 100 + attempt)
        stage.d1.lose()
        stage.d1.is_lost = False  # back at once
    with pytest.raises(ServiceUnavailable, match="lost by 3 workers"):
        await answering.end()
    assert answering.tokens == [100, 101, 102]
    stage.assert_nothing_is_left()


async def test_a_worker_that_says_nothing_for_too_long_loses_the_request() -> None:
    stage = Stage(with_prefill=False, silence_deadline_s=0.05)
    answering = stage.start()
    await until(lambda: stage.d1.open_requests)
    stage.d2.may_reply.clear()
    stage.d1.replies.append(RefusalKind.NO_ROOM)
    async with asyncio.timeout(5):
        while not stage.d2.submits:
            await asyncio.sleep(0.01)
    assert len(stage.d1.aborts) == 1
    stage.d2.may_reply.set()
    await until(lambda: stage.d2.open_requests)
    stage.d2.say(0, 100, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100]


async def test_a_seed_is_drawn_once_and_kept_over_attempts_and_choices(aggregated: Stage) -> None:
    answering = aggregated.start(n=2)
    await until(lambda: aggregated.d1.open_requests)
    aggregated.d1.say(0, 100)
    await until(lambda: len(aggregated.d1.open_requests) == 2)
    aggregated.d1.lose()
    await until(lambda: len(aggregated.d2.open_requests) == 2)
    seeds = {submit.spec.sampling.seed for worker in aggregated.workers for submit in worker.submits}
    assert len(seeds) == 1 and None not in seeds
    await answering.generation.aclose()
    await answering.end()
    another = aggregated.start()
    await until(lambda: len(aggregated.d2.submits) == 3)
    assert aggregated.d2.submits[-1].spec.sampling.seed not in seeds
    await another.generation.aclose()


async def test_a_seed_that_the_user_gave_is_the_one_that_workers_get(aggregated: Stage) -> None:
    answering = aggregated.start(seed=0)
    await until(lambda: aggregated.d1.submits)
    assert aggregated.d1.submits[0].spec.sampling.seed == 0
    await answering.generation.aclose()


# ---- several choices


async def test_the_other_choices_start_when_the_first_token_of_the_first_has_come(aggregated: Stage) -> None:
    answering = aggregated.start(n=3)
    await until(lambda: aggregated.d1.open_requests)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(aggregated.d1.submits) == 1
    aggregated.d1.say(0, 100)
    await until(lambda: len(aggregated.d1.open_requests) == 3)
    assert [submit.spec.choice for submit in aggregated.d1.submits] == [0, 1, 2]
    for number, request_id in enumerate(aggregated.d1.open_requests):
        aggregated.d1.say(1 if number == 0 else 0, 200 + number, finish=LENGTH, to=request_id)
    await answering.end()
    assert {(output.choice, output.token_ids) for output in answering.outputs} == {
        (0, (100,)), (0, (200,)), (1, (201,)), (2, (202,)),
    }  # fmt: skip
    assert answering.generation.account is not None and answering.generation.account.num_output_tokens == 4


async def test_an_error_of_one_choice_ends_all(aggregated: Stage) -> None:
    answering = aggregated.start(n=2)
    await until(lambda: aggregated.d1.open_requests)
    aggregated.d1.replies.append(RefusalKind.INVALID)
    aggregated.d1.say(0, 100)
    with pytest.raises(InvalidRequest):
        await answering.end()


# ---- hang-ups


async def test_hanging_up_while_workers_are_asked_leaves_nothing(stage: Stage) -> None:
    for slow in (stage.d1, stage.p1):
        slow.may_reply.clear()
        answering = stage.start()
        await until(lambda slow=slow: len(slow.submits) == 1)
        await answering.generation.aclose()
        await answering.end()
        stage.assert_nothing_is_left()
        slow.may_reply.set()
    assert answering.outputs == []
    assert {outcome for outcome, _ in stage.records.ends} == {"aborted"}


async def test_hanging_up_while_waiting_for_room_leaves_nothing() -> None:
    stage = Stage(with_prefill=False)
    stage.d1.lose()
    stage.d2.lose()
    answering = stage.start()
    await until(lambda: stage.pool.num_waits)
    await answering.generation.aclose()
    await answering.end()
    stage.assert_nothing_is_left()


@pytest.mark.parametrize("num_turns", range(12))
async def test_hanging_up_from_another_task_at_any_moment_ends_the_iteration(stage: Stage, num_turns: int) -> None:
    answering = stage.start(n=2)
    for turn in range(num_turns):
        if turn == 8:
            stage.p1.say(0, 100)
        await asyncio.sleep(0)
    await asyncio.wait_for(answering.generation.aclose(), 5)
    await answering.end()
    assert answering.generation.account is not None
    assert [outcome for outcome, _ in stage.records.ends] == ["aborted"]


async def test_an_iteration_that_begins_after_the_hang_up_is_empty_and_asks_no_worker(stage: Stage) -> None:
    spec = RequestSpec(request_id="a", token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=SamplingParams())
    generation = stage.coordinator.generate(spec)
    await generation.aclose()
    assert [output async for output in generation] == []
    assert [worker.submits for worker in stage.workers] == [[]] * 4
    assert generation.account is not None and len(stage.records.ends) == 1


async def test_a_consumer_that_stops_iterating_and_closes_leaves_nothing_and_is_accounted_once(stage: Stage) -> None:
    spec = RequestSpec(request_id="a", token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=SamplingParams())
    generation = stage.coordinator.generate(spec)
    outputs = aiter(generation)
    first = asyncio.create_task(anext(outputs))
    await until(lambda: stage.p1.open_requests)
    stage.p1.say(0, 100)
    assert (await asyncio.wait_for(first, 5)).token_ids == (100,)
    await generation.aclose()
    await generation.aclose()
    stage.assert_nothing_is_left()
    assert [outcome for outcome, _ in stage.records.ends] == ["aborted"]
    with pytest.raises(StopAsyncIteration):
        await anext(outputs)
    assert len(stage.records.ends) == 1


async def test_closing_after_the_end_changes_nothing(aggregated: Stage) -> None:
    answering = aggregated.start()
    await until(lambda: aggregated.d1.open_requests)
    aggregated.d1.say(0, 100, finish=LENGTH)
    await answering.end()
    account = answering.generation.account
    await answering.generation.aclose()
    assert answering.generation.account is account
    assert [outcome for outcome, _ in aggregated.records.ends] == ["finished"]


# ---- accounts and load


async def test_the_account_splits_the_time_as_the_workers_say_and_sums_to_all_of_it(stage: Stage) -> None:
    stage.d1.may_reply.clear()
    answering = stage.start()
    await until(lambda: stage.d1.submits)
    stage.clock.advance(1.0)  # in the ingress, until workers are found
    stage.d1.may_reply.set()
    await until(lambda: stage.p1.open_requests)
    stage.clock.advance(8.0)
    stage.p1.say(0, 100, timing=RequestTiming(queue_s=2.0, prefill_s=5.0), num_cached_tokens=4)
    await until(lambda: answering.outputs)
    stage.clock.advance(4.0)
    stage.d1.say(1, 101, timing=RequestTiming(transfer_s=1.5, queue_s=0.5, prefill_s=1.0))
    await until(lambda: len(answering.outputs) == 2)
    stage.clock.advance(16.0)
    stage.d1.say(2, 102, finish=LENGTH)
    await answering.end()
    account = answering.generation.account
    assert account is not None
    assert (account.queue_s, account.prefill_s, account.transfer_s) == (1.0 + 2.0 + 0.5, 5.0, 1.5)
    assert (account.decode_s, account.network_s, account.total_s) == (1.0 + 16.0, 1.0 + 1.0, 29.0)
    assert (account.time_to_first_token_s, account.num_cached_tokens, account.num_output_tokens) == (9.0, 4, 3)
    assert (account.prefill_worker, account.decode_worker) == ("p1", "d1")
    assert (account.attempts, account.route_reason, account.num_prompt_tokens) == (1, "first in order", len(PROMPT))


async def test_a_request_counts_against_its_workers_from_its_routing_until_their_next_snapshots(stage: Stage) -> None:
    stage.d1.may_reply.clear()
    answering = stage.start()
    await until(lambda: stage.d1.submits)
    assert stage.pending_on(stage.p1) == Load(1, len(PROMPT), len(PROMPT))
    assert stage.pending_on(stage.d1) == Load(1, 0, len(PROMPT))
    stage.d1.may_reply.set()
    await until(lambda: stage.p1.open_requests)
    assert stage.pending_on(stage.p1).num_requests == 1
    stage.p1.snapshot = msgspec.structs.replace(stage.p1.snapshot, num_waiting=1)
    assert stage.pending_on(stage.p1) == Load()
    assert stage.pending_on(stage.d1).num_requests == 1
    await answering.generation.aclose()


async def test_whoever_asked_hears_of_each_worker_that_accepted_a_request() -> None:
    stage = Stage()
    placed: list[tuple[str, str]] = []
    stage.coordinator.on_placed = lambda worker_id, request_id: placed.append((worker_id, request_id))
    stage.d1.replies.append(RefusalKind.NO_ROOM)
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    await until(lambda: len(placed) == 2)
    assert placed == [("d2", stage.d2.open_requests[0]), ("p1", stage.p1.open_requests[0])]
    await answering.generation.aclose()


async def test_two_requests_that_bear_one_id_have_different_ids_on_the_workers(aggregated: Stage) -> None:
    both = [aggregated.start(), aggregated.start()]
    await until(lambda: len(aggregated.d1.open_requests) == 2)
    for request_id in aggregated.d1.open_requests:
        aggregated.d1.say(0, 100, finish=LENGTH, to=request_id)
    for answering in both:
        await answering.end()


async def test_the_service_is_ready_when_a_decode_worker_is_connected() -> None:
    stage = Stage()
    assert stage.coordinator.status().ready
    stage.d1.lose()
    stage.d2.lose()
    status = stage.coordinator.status()
    assert not status.ready and "decode" in status.reason
    assert [snapshot.worker_id for snapshot in status.workers] == ["p1", "p2"]
