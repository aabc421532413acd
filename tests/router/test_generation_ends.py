"""How a request ends over workers that a script drives: hang-ups at every moment, what is left, and the account."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from eagleray.core.messages import RefusalKind, RequestTiming
from eagleray.core.request import FinishReason, RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.telemetry import QueueParts
from eagleray.router.pending import Load

Stage = Any  # of conftest.py, which test modules cannot import
NewStage = Callable[..., Any]
Until = Callable[[Callable[[], object]], Awaitable[None]]

PROMPT = tuple(range(1, 13))  # what a stage starts
LENGTH = FinishReason.LENGTH


# ---- hang-ups


async def test_hanging_up_while_workers_are_asked_leaves_nothing(stage: Stage, until: Until) -> None:
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


async def test_hanging_up_while_waiting_for_room_leaves_nothing(until: Until, new_stage: NewStage) -> None:
    stage = new_stage(with_prefill=False)
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


async def test_a_consumer_that_stops_iterating_and_closes_leaves_nothing_and_is_accounted_once(
    stage: Stage, until: Until
) -> None:
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


async def test_closing_after_the_end_changes_nothing(aggregated: Stage, until: Until) -> None:
    answering = aggregated.start()
    await until(lambda: aggregated.d1.open_requests)
    aggregated.d1.say(0, 100, finish=LENGTH)
    await answering.end()
    account = answering.generation.account
    await answering.generation.aclose()
    assert answering.generation.account is account
    assert [outcome for outcome, _ in aggregated.records.ends] == ["finished"]


# ---- accounts and load


async def test_the_account_splits_the_time_as_the_workers_say_and_sums_to_all_of_it(stage: Stage, until: Until) -> None:
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


async def test_the_account_tells_what_a_queue_consists_of(stage: Stage, until: Until) -> None:
    for worker in (stage.d1, stage.d2, stage.p1):
        worker.may_reply.clear()
    stage.d1.replies.append(RefusalKind.NO_ROOM)
    answering = stage.start(already_s=0.25)
    for seconds, worker in ((1.0, stage.d1), (2.0, stage.d2), (4.0, stage.p1)):
        await until(lambda worker=worker: worker.submits)
        stage.clock.advance(seconds)
        worker.may_reply.set()
    await until(lambda: stage.p1.open_requests)
    stage.clock.advance(16.0)
    stage.p1.say(0, 100, timing=RequestTiming(queue_s=8.0, prefill_s=5.0))
    await until(lambda: answering.outputs)
    stage.d2.say(1, 101, finish=LENGTH)
    await answering.end()
    account = answering.generation.account
    assert account is not None and account.queue_s == 0.25 + 1.0 + 2.0 + 4.0 + 8.0
    assert account.queue == QueueParts(
        read_s=0.25, route_s=0.0, decode_accept_s=1.0 + 2.0, prefill_accept_s=4.0, first_step_s=8.0
    )


async def test_a_second_token_that_comes_first_takes_no_time_from_the_prefill(stage: Stage, until: Until) -> None:
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.clock.advance(8.0)
    stage.d1.say(1, 101, timing=RequestTiming(transfer_s=3.0, prefill_s=1.0))
    await asyncio.sleep(0)
    stage.p1.say(0, 100, timing=RequestTiming(queue_s=1.0, prefill_s=6.0))
    await until(lambda: len(answering.outputs) == 2)
    stage.d1.say(2, 102, finish=LENGTH)
    await answering.end()
    account = answering.generation.account
    assert account is not None
    assert (account.queue_s, account.prefill_s, account.network_s, account.total_s) == (1.0, 6.0, 1.0, 8.0)


async def test_a_request_counts_against_its_workers_from_its_routing_until_their_next_snapshots(
    stage: Stage, until: Until
) -> None:
    stage.d1.may_reply.clear()
    answering = stage.start()
    await until(lambda: stage.d1.submits)
    assert stage.pending_on(stage.p1) == Load(1, len(PROMPT), len(PROMPT))
    assert stage.pending_on(stage.d1) == Load(1, 0, len(PROMPT))
    stage.d1.may_reply.set()
    await until(lambda: stage.p1.open_requests)
    assert stage.pending_on(stage.p1).num_requests == 1
    stage.p1.snapshot = msgspec.structs.replace(stage.p1.snapshot, number=1)
    assert stage.pending_on(stage.p1) == Load()
    assert stage.pending_on(stage.d1).num_requests == 1
    await answering.generation.aclose()


async def test_whoever_asked_hears_of_each_worker_that_accepted_a_request(until: Until, new_stage: NewStage) -> None:
    stage = new_stage()
    placed: list[tuple[str, str]] = []
    stage.coordinator.on_placed = lambda worker_id, request_id: placed.append((worker_id, request_id))
    stage.d1.replies.append(RefusalKind.NO_ROOM)
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    await until(lambda: len(placed) == 2)
    assert placed == [("d2", stage.d2.open_requests[0]), ("p1", stage.p1.open_requests[0])]
    await answering.generation.aclose()


async def test_two_requests_that_bear_one_id_have_different_ids_on_the_workers(aggregated: Stage, until: Until) -> None:
    both = [aggregated.start(), aggregated.start()]
    await until(lambda: len(aggregated.d1.open_requests) == 2)
    for request_id in aggregated.d1.open_requests:
        aggregated.d1.say(0, 100, finish=LENGTH, to=request_id)
    for answering in both:
        await answering.end()


async def test_the_service_is_ready_when_a_decode_worker_is_connected(new_stage: NewStage) -> None:
    stage = new_stage()
    assert stage.coordinator.status().ready
    stage.d1.lose()
    stage.d2.lose()
    status = stage.coordinator.status()
    assert not status.ready and "decode" in status.reason
    assert [snapshot.worker_id for snapshot in status.workers] == ["p1", "p2"]
