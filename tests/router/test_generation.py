"""A request's way over workers that a script drives: order, losses, refusals, deadlines, several choices. No engine, no
socket, and a clock that moves when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from eagleray.core.acceptance import Acceptance
from eagleray.core.errors import InvalidRequest, Overloaded, ServiceUnavailable, WorkerLost
from eagleray.core.messages import RefusalKind
from eagleray.core.request import FinishReason
from eagleray.core.snapshot import Role
from eagleray.router.fake_workers import FakeWorker, fake_welcome

Stage = Any  # of conftest.py, which test modules cannot import
NewStage = Callable[..., Any]
Until = Callable[[Callable[[], object]], Awaitable[None]]

PROMPT = tuple(range(1, 13))  # what a stage starts
LENGTH = FinishReason.LENGTH


# ---- placing


async def test_the_decode_worker_reserves_before_the_prefill_worker_hears_of_the_request(
    stage: Stage, until: Until
) -> None:
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


@pytest.mark.parametrize("kind", [RefusalKind.NO_ROOM, RefusalKind.DRAINING, RefusalKind.INCOMPATIBLE])
async def test_a_refusal_moves_on_to_the_next_worker(stage: Stage, kind: RefusalKind, until: Until) -> None:
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


async def test_a_prefill_worker_that_refuses_gives_the_reservation_back_and_another_pair_is_found(
    stage: Stage, until: Until
) -> None:
    stage.p1.replies.append(RefusalKind.NO_ROOM)
    answering = stage.start()
    await until(lambda: stage.p2.open_requests)
    first, second = stage.d1.submits
    assert stage.d1.aborts == [first.spec.request_id]
    assert stage.d1.open_requests == [second.spec.request_id]
    assert second.pull_from == stage.p2.welcome.region
    await answering.generation.aclose()
    await answering.end()


async def test_a_prefill_worker_with_another_draft_is_passed_over(stage: Stage, until: Until) -> None:
    stage.p1.welcome = fake_welcome("p1", Role.PREFILL, draft_identity="other")
    answering = stage.start()
    await until(lambda: stage.p2.open_requests)
    stage.p2.say(0, 100)
    stage.d1.say(1, 101, finish=LENGTH)
    await answering.end()
    assert stage.p1.submits == []
    account = answering.generation.account
    assert account is not None
    assert "KV of p1 cannot be read: draft none here, other there" in account.route_reason


async def test_where_no_prefill_worker_can_be_read_the_decode_worker_does_both(stage: Stage, until: Until) -> None:
    for worker in (stage.p1, stage.p2):
        worker.welcome = fake_welcome("p", Role.PREFILL, draft_identity="other")
    answering = stage.start()
    await until(lambda: stage.d1.open_requests)
    stage.d1.say(0, 100, finish=LENGTH)
    await answering.end()
    assert stage.d1.submits[0].pull_from is None and stage.p1.submits == stage.p2.submits == []


async def test_a_worker_that_does_not_answer_a_submit_is_passed_over(stage: Stage, until: Until) -> None:
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


async def test_a_request_refused_by_all_waits_for_a_change_and_does_not_spin(aggregated: Stage, until: Until) -> None:
    for worker in (aggregated.d1, aggregated.d2):
        worker.replies.extend([RefusalKind.NO_ROOM] * 2)
    answering = aggregated.start()
    await until(lambda: aggregated.pool.num_waits)
    for _ in range(50):
        await asyncio.sleep(0)
    assert (len(aggregated.d1.submits), len(aggregated.d2.submits)) == (1, 1)
    aggregated.pool.advance(0.0)  # woken, but no worker has told anything new
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


async def test_room_that_is_told_while_a_worker_refuses_is_not_overlooked(aggregated: Stage, until: Until) -> None:
    worker = aggregated.d1
    aggregated.d2.lose()
    worker.replies.append(RefusalKind.NO_ROOM)
    worker.may_reply.clear()
    answering = aggregated.start()
    await until(lambda: worker.submits)
    aggregated.pool.change()  # the last thing that it will tell: nothing changes any more
    worker.may_reply.set()
    await until(lambda: worker.open_requests)
    worker.say(0, 100, finish=LENGTH)
    await answering.end()


async def test_a_request_that_finds_no_worker_fails_at_the_queue_deadline_saying_why(
    aggregated: Stage, until: Until
) -> None:
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


async def test_a_waiting_request_goes_to_a_worker_that_joins(until: Until, new_stage: NewStage) -> None:
    stage = new_stage(with_prefill=False)
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
    account = answering.generation.account
    assert account is not None and account.queue is not None
    assert account.queue_s == account.queue.route_s == 3.0


async def test_more_waiting_requests_than_allowed_are_turned_away_with_a_time_to_come_back(
    until: Until, new_stage: NewStage
) -> None:
    stage = new_stage(with_prefill=False, max_queued=2)
    stage.d1.lose()
    stage.d2.lose()
    waiting = [stage.start(), stage.start()]
    await until(lambda: len(stage.coordinator.line) == 2)
    stage.clock.advance(4.0)
    with pytest.raises(Overloaded, match="2 requests are waiting") as refusal:
        stage.start()
    assert refusal.value.retry_after_s == 4.0
    for answering in waiting:
        await answering.generation.aclose()
        await answering.end()
    stage.assert_nothing_is_left()


async def test_a_worker_that_is_in_a_long_step_is_not_asked(aggregated: Stage, until: Until) -> None:
    aggregated.d1.snapshot = msgspec.structs.replace(aggregated.d1.snapshot, step_running_s=5.5)
    answering = aggregated.start()
    await until(lambda: aggregated.d2.open_requests)
    assert aggregated.d1.submits == []
    await answering.generation.aclose()
    await answering.end()


# ---- the line of those that found no room


async def test_only_the_first_in_the_line_asks_again_and_the_others_follow_in_order(
    until: Until, new_stage: NewStage
) -> None:
    stage = new_stage(with_prefill=False)
    stage.d2.lose()
    stage.d1.replies.extend([RefusalKind.NO_ROOM] * 2)
    first = stage.start(max_tokens=1)
    await until(lambda: stage.pool.num_waits == 1)
    others = [stage.start(max_tokens=2), stage.start(max_tokens=3)]
    await until(lambda: len(stage.coordinator.line) == 3)
    assert len(stage.d1.submits) == 1, "who comes while others wait joins the line without trying"
    stage.pool.change()
    await until(lambda: len(stage.d1.submits) == 2 and stage.pool.num_waits == 1)
    stage.pool.change()
    await until(lambda: len(stage.d1.open_requests) == 3)
    asked = [submit.spec.sampling.max_tokens for submit in stage.d1.submits]
    assert asked == [1, 1, 1, 2, 3]
    for answering in (first, *others):
        await answering.generation.aclose()
        await answering.end()
    stage.assert_nothing_is_left()


async def test_the_next_in_the_line_tries_when_the_first_hangs_up(until: Until, new_stage: NewStage) -> None:
    stage = new_stage(with_prefill=False)
    stage.d2.lose()
    stage.d1.replies.append(RefusalKind.NO_ROOM)
    first = stage.start()
    await until(lambda: stage.pool.num_waits == 1)
    second = stage.start()
    await until(lambda: len(stage.coordinator.line) == 2)
    await first.generation.aclose()
    await until(lambda: stage.d1.open_requests)
    await second.generation.aclose()
    await second.end()
    stage.assert_nothing_is_left()


async def test_who_waits_behind_others_fails_at_its_own_deadline(until: Until, new_stage: NewStage) -> None:
    stage = new_stage(with_prefill=False, queue_deadline_s=0.05)
    stage.d1.lose()
    stage.d2.lose()
    head = stage.start()
    await until(lambda: stage.pool.num_waits == 1)
    behind = stage.start()
    with pytest.raises(ServiceUnavailable, match="others have waited for longer"):
        await behind.end()
    await head.generation.aclose()
    await head.end()
    stage.assert_nothing_is_left()


# ---- tokens of two workers


async def test_a_second_token_that_comes_before_the_first_waits_for_it(stage: Stage, until: Until) -> None:
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.d1.say(1, 101)
    await asyncio.sleep(0)
    stage.p1.say(0, 100)
    stage.d1.say(2, 102, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100, 101, 102]
    said = [output.position + offset for output in answering.outputs for offset in range(len(output.token_ids))]
    assert said == [0, 1, 2]


async def test_a_first_token_that_both_workers_say_comes_once(stage: Stage, until: Until) -> None:
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.d1.say(0, 100)
    stage.p1.say(0, 100)
    stage.d1.say(1, 101, 102, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100, 101, 102]


async def test_a_request_that_ends_with_its_first_token_gives_the_reservation_back(stage: Stage, until: Until) -> None:
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.p1.say(0, 100, finish=FinishReason.STOP)
    await answering.end()
    assert answering.outputs[-1].finish_reason is FinishReason.STOP
    assert stage.d1.aborts == [stage.d1.submits[0].spec.request_id]


# ---- losses


async def test_a_lost_decode_worker_is_replaced_by_one_that_knows_all_tokens_so_far(stage: Stage, until: Until) -> None:
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


async def test_what_came_of_guesses_adds_up_over_attempts(stage: Stage, until: Until) -> None:
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.p1.say(0, 100)
    stage.d1.say(1, 101, 102, acceptance=Acceptance.of_step(3, 3, 1, verify_s=0.5, draft_s=0.25))
    stage.d1.lose()
    await until(lambda: len(stage.p1.submits) == 2)
    stage.p1.say(3, 103)
    stage.d2.say(4, 104, 105, 106, finish=LENGTH, acceptance=Acceptance.of_step(3, 3, 2, verify_s=0.5, draft_s=0.25))
    await answering.end()
    account = answering.generation.account
    assert account is not None and account.acceptance == Acceptance(
        num_steps=2, num_draft_tokens=6, num_accepted_tokens=3, drafts_per_position=(2, 2, 2),
        accepted_per_position=(2, 1), verify_s=1.0, draft_s=0.5,
    )  # fmt: skip
    assert 'spec_decode_accepted_tokens_total{gen_ai_request_model="fake"} 3.0' in stage.coordinator.metrics_text()


async def test_tokens_that_a_lost_worker_said_out_of_order_are_not_known_to_the_next(
    stage: Stage, until: Until
) -> None:
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


async def test_a_decode_worker_that_is_lost_while_the_prefill_worker_is_asked_is_replaced(
    stage: Stage, until: Until
) -> None:
    stage.p1.may_reply.clear()
    answering = stage.start()
    await until(lambda: stage.p1.submits)
    stage.d1.lose()
    stage.p1.may_reply.set()
    await until(lambda: stage.d2.open_requests and stage.p1.open_requests)
    stage.p1.say(0, 100)
    stage.d2.say(1, 101, finish=LENGTH)
    await answering.end()
    assert answering.tokens == [100, 101]
    assert answering.generation.account is not None and answering.generation.account.attempts == 2


async def test_a_lost_prefill_worker_is_the_decode_workers_affair(stage: Stage, until: Until) -> None:
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
    stage: Stage, lost_first: bool, until: Until
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


@pytest.mark.parametrize("seen_by", ["nobody", "its prefill worker, which has said its token"])
async def test_a_gap_that_nobody_can_fill_ends_the_attempt_at_once(
    until: Until, new_stage: NewStage, seen_by: str
) -> None:
    stage = new_stage(with_prefill=seen_by != "nobody")
    answering = stage.start()
    await until(lambda: stage.d1.open_requests)
    if seen_by != "nobody":
        await until(lambda: stage.p1.open_requests)
        stage.p1.say(0, 100)
    stage.d1.say(3, 103)
    await until(lambda: len(stage.d1.submits) == 2)
    assert stage.d1.aborts == [stage.d1.submits[0].spec.request_id]
    await answering.generation.aclose()
    await answering.end()


# ---- how often


async def lose_after(stage: Stage, until: Until, *tokens: int, position: int, engine_failed: bool = False) -> None:
    """The first decode worker gets the request, says the tokens, is lost, and is back at once."""
    await until(lambda: stage.d1.open_requests)
    if tokens:
        stage.d1.say(position, *tokens)
    stage.d1.lose(engine_failed=engine_failed)
    stage.d1.is_lost = False


async def test_attempts_count_since_the_last_new_token(until: Until, new_stage: NewStage) -> None:
    stage = new_stage(with_prefill=False, max_attempts=3)
    answering = stage.start()
    for position in range(8):
        await lose_after(stage, until, 100 + position, position=position)
    for _ in range(3):
        await lose_after(stage, until, position=8)
    with pytest.raises(ServiceUnavailable, match="lost by 3 workers in a row"):
        await answering.end()
    assert answering.tokens == list(range(100, 108))
    stage.assert_nothing_is_left()


async def test_a_request_that_breaks_engines_breaks_max_attempts_of_them_though_each_says_a_token(
    until: Until, new_stage: NewStage
) -> None:
    stage = new_stage(with_prefill=False, max_attempts=3)
    answering = stage.start()
    for position in range(3):
        await lose_after(stage, until, 100 + position, position=position, engine_failed=True)
    with pytest.raises(ServiceUnavailable, match="3 workers failed while they computed the request"):
        await answering.end()
    assert answering.tokens == [100, 101, 102] and len(stage.d1.submits) == 3
    stage.assert_nothing_is_left()


async def test_engines_of_prefill_workers_count_too(until: Until, new_stage: NewStage) -> None:
    stage = new_stage(max_attempts=2)
    answering = stage.start()
    await until(lambda: stage.p1.open_requests)
    stage.p1.lose("out of memory", engine_failed=True)
    stage.d1.lose("out of memory", engine_failed=True)
    with pytest.raises(ServiceUnavailable, match=r"2 workers failed .*: out of memory"):
        await answering.end()
    assert stage.d2.submits == []
    stage.assert_nothing_is_left()


async def test_an_engine_that_fails_when_it_is_asked_counts_too(until: Until, new_stage: NewStage) -> None:
    stage = new_stage(with_prefill=False, max_attempts=2)
    stage.d1.replies.append(WorkerLost("d1", "its engine failed", engine_failed=True))
    stage.d2.replies.append(WorkerLost("d2", "its engine failed", engine_failed=True))
    stage.workers.append(FakeWorker(fake_welcome("d3", Role.DECODE)))
    stage.pool.join(stage.workers[-1])
    answering = stage.start()
    with pytest.raises(ServiceUnavailable, match="2 workers failed"):
        await answering.end()
    assert stage.workers[-1].submits == []
    stage.assert_nothing_is_left()


async def test_a_worker_that_says_nothing_for_too_long_loses_the_request(until: Until, new_stage: NewStage) -> None:
    stage = new_stage(with_prefill=False, silence_deadline_s=0.05)
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


async def test_a_seed_is_drawn_once_and_kept_over_attempts_and_choices(aggregated: Stage, until: Until) -> None:
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


async def test_a_seed_that_the_user_gave_is_the_one_that_workers_get(aggregated: Stage, until: Until) -> None:
    answering = aggregated.start(seed=0)
    await until(lambda: aggregated.d1.submits)
    assert aggregated.d1.submits[0].spec.sampling.seed == 0
    await answering.generation.aclose()


# ---- several choices


async def test_the_other_choices_start_when_the_first_token_of_the_first_has_come(
    aggregated: Stage, until: Until
) -> None:
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


async def test_an_error_of_one_choice_ends_all(aggregated: Stage, until: Until) -> None:
    answering = aggregated.start(n=2)
    await until(lambda: aggregated.d1.open_requests)
    aggregated.d1.replies.append(RefusalKind.INVALID)
    aggregated.d1.say(0, 100)
    with pytest.raises(InvalidRequest):
        await answering.end()
