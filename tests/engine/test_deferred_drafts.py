"""While nothing is guessed, KV of a draft model waits: until much of it is lacking, or until somebody wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from eagleray.core.request import Request, RequestState
from eagleray.engine.speculation.controller import FixedDrafts
from eagleray.engine.speculation.tree import DraftShape

BLOCK_SIZE_TOKENS = 4


class Sometimes:
    """Implements ``DraftPolicy``: guesses when it is told to."""

    may_defer = True

    def __init__(self) -> None:
        self.guesses = False
        always = FixedDrafts(DraftShape(2))
        self.slots_needed = always.slots_needed
        self.note_acceptance, self.note_times = always.note_acceptance, always.note_times

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        return DraftShape(2) if self.guesses else None


@pytest.fixture
def policy() -> Sometimes:
    return Sometimes()


@pytest.fixture
def bench(new_bench: Callable[..., Any], policy: Sometimes) -> Any:
    return new_bench(policy, block_size_tokens=BLOCK_SIZE_TOKENS)


def test_a_prompt_is_complete_at_once_and_single_tokens_wait(bench: Any) -> None:
    request = bench.add("a", 9)
    assert not bench.step().runs[0].defers
    assert bench.num_findable() == 2
    plans = [bench.step() for _ in range(10)]
    assert all(plan.runs[0].defers for plan in plans)
    assert [plan.runs[0].num_deferred for plan in plans] == list(range(10))
    assert (request.num_complete_tokens, request.num_computed_tokens) == (9, 19)


def test_blocks_are_findable_only_when_what_waited_has_been_written(bench: Any) -> None:
    bench.add("a", 9)
    bench.step(), bench.num_findable()
    while bench.step().runs[0].defers:
        assert bench.num_findable() == 0
    assert bench.num_findable() > 5


def test_nothing_waits_for_long_and_all_requests_are_written_together(bench: Any) -> None:
    requests = [bench.add(str(index), 2 + index) for index in range(20)]
    for _ in range(60):
        bench.step()
        waiting = [request.num_computed_tokens - request.num_complete_tokens for request in requests]
        assert sum(waiting) < 256 + len(requests)
        assert len(set(waiting)) == 1


def test_what_waited_is_written_when_guesses_begin(bench: Any, policy: Sometimes) -> None:
    request = bench.add("a", 9)
    for _ in range(6):
        bench.step()
    policy.guesses = True
    run = bench.step().runs[0]
    assert (run.may_draft, run.defers, run.num_deferred) == (True, False, 5)
    assert request.num_complete_tokens == request.num_computed_tokens


def test_nothing_waits_in_a_request_that_is_handed_over(bench: Any) -> None:
    bench.add("a", 9, output_limit=5)
    for _ in range(5):
        assert not bench.step().runs[0].defers


def test_blocks_for_guesses_are_given_back_before_the_next_step(bench: Any, policy: Sometimes) -> None:
    policy.guesses = True
    bench.add("a", 7)
    bench.step()
    assert len(bench.kv.table("a")) == 3
    policy.guesses = False
    bench.step()
    assert len(bench.kv.table("a")) == 2


def test_who_takes_the_id_of_a_request_that_guessed_keeps_its_own_blocks(bench: Any, policy: Sometimes) -> None:
    policy.guesses = True
    gone = bench.add("a", 7)
    bench.step()
    bench.scheduler.end(gone, RequestState.FINISHED)
    longer = Request(msgspec.structs.replace(gone.spec, token_ids=tuple(range(20))), 0.0)
    assert bench.scheduler.reserve(longer)
    assert bench.step().is_empty
    assert len(bench.kv.table("a")) == 6
