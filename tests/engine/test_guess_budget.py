"""Guesses take what known tokens leave of a step's budget, evenly, and no more than may come true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eagleray.core.request import Request, RequestState
from eagleray.engine.scheduling.shares import even_shares
from eagleray.engine.speculation.controller import FixedDrafts, NoDrafts
from eagleray.engine.speculation.tree import DraftShape, DraftTree, chain

BUDGET, NUM_GUESSES = 512, 48
TREE = DraftTree((1,) * NUM_GUESSES, (-1, -1, *(node // 2 for node in range(NUM_GUESSES - 2))))


@pytest.fixture
def guessing_bench(new_bench: Callable[..., Any]) -> Callable[..., Any]:
    """Guesses ``draft`` at every step."""

    def guessing(draft: DraftTree = TREE, **settings: Any) -> Any:
        policy = FixedDrafts(DraftShape(max(draft.depths), 2, len(draft)))
        return new_bench(policy, draft, max_num_batched_tokens=BUDGET, **settings)

    return guessing


def test_everybody_gets_a_token_each_step_and_a_like_share_of_guesses(guessing_bench: Callable[..., Any]) -> None:
    bench = guessing_bench()
    requests = [bench.add(str(index), 8) for index in range(16)]
    bench.step()
    for _ in range(60):
        plan = bench.step()
        shares = [len(run.draft) for run in plan.runs if run.draft is not None]
        assert len(shares) == 16 and sum(run.num_rows for run in plan.runs) == BUDGET
        assert max(shares) - min(shares) <= 1
    assert [request.num_output_tokens for request in requests] == [61] * 16


def test_a_prompt_that_comes_to_many_guesses_is_computed_all_the_same(guessing_bench: Callable[..., Any]) -> None:
    bench = guessing_bench()
    for index in range(16):
        bench.add(str(index), 8)
    bench.step()
    late = bench.add("late", 1000)
    later = bench.add("later", 100)
    rows = [sum(run.num_rows for run in bench.step().runs) for _ in range(6)]
    assert rows == [BUDGET] * 6
    assert late.num_output_tokens > 0 and later.num_output_tokens > 0


def test_prompts_that_have_no_seat_take_nothing_from_guesses(guessing_bench: Callable[..., Any]) -> None:
    bench = guessing_bench(max_num_seqs=16)
    for index in range(20):
        bench.add(str(index), 8)
    bench.step()
    assert sum(len(run.draft or ()) for run in bench.step().runs) == BUDGET - 16


def test_prompts_that_have_no_blocks_take_nothing_from_guesses(guessing_bench: Callable[..., Any]) -> None:
    bench = guessing_bench(num_blocks=16 * 20)
    for index in range(16):
        bench.add(str(index), 8)
    bench.step()
    waiting = bench.add("waiting", 16 * 310)
    bench.add("would fit, but does not overtake", 32)
    assert [sum(len(run.draft or ()) for run in bench.step().runs) for _ in range(3)] == [BUDGET - 16] * 3
    assert waiting.state is RequestState.QUEUED
    bench.scheduler.end(waiting, RequestState.ABORTED)
    assert [run.num_tokens for run in bench.step().runs if run.spec.request_id.startswith("would")] == [32]


def test_of_a_prompt_that_is_cached_only_the_rest_is_left_room_for(guessing_bench: Callable[..., Any]) -> None:
    bench = guessing_bench()
    bench.scheduler.end(cached_after(bench, bench.add("first", 200)), RequestState.FINISHED)
    for index in range(16):
        bench.add(str(index), 8)
    bench.step()
    bench.add("again", 200)
    runs = bench.step().runs
    assert [run.num_tokens for run in runs][-1] == 200 - 192
    assert sum(len(run.draft or ()) for run in runs) == BUDGET - 16 - 8


class Asked:
    """Implements ``DraftPolicy``: never guesses, and keeps what it is asked."""

    may_defer = False

    def __init__(self) -> None:
        never = NoDrafts()
        self.slots_needed = never.slots_needed
        self.note_acceptance, self.note_times = never.note_acceptance, never.note_times
        self.num_decoding: list[int] = []

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        self.num_decoding.append(num_decoding)
        return None


def test_the_step_that_ends_prompts_guesses_for_their_requests(new_bench: Callable[..., Any]) -> None:
    """Nobody decodes yet: a policy that is asked for nobody would leave the first tokens without guesses."""
    policy = Asked()
    bench = new_bench(policy, max_num_batched_tokens=100)
    bench.add("two steps", 150)
    bench.add("one step", 20)
    bench.add("handed over", 10, output_limit=1)
    bench.step(), bench.step()
    assert policy.num_decoding == [0, 2]


def test_of_a_prompt_that_is_cached_only_the_rest_keeps_its_request_from_being_guessed_for(
    new_bench: Callable[..., Any],
) -> None:
    policy = Asked()
    bench = new_bench(policy, max_num_batched_tokens=100)
    first = bench.add("first", 150)
    bench.step(), bench.step()
    bench.scheduler.end(first, RequestState.FINISHED)
    bench.add("again", 150)
    (run,) = bench.step().runs
    assert run.samples and policy.num_decoding[-1] == 1


def cached_after(bench: Any, request: Request) -> Request:
    bench.step()
    return request


@pytest.mark.parametrize(
    ("num_decoding", "max_rows", "expected"),
    [
        (0, 0, 5),
        (1, 64, 5),
        (4, 24, 5),
        (4, 23, 5),
        (4, 20, 4),
        (4, 17, 4),
        (4, 16, 3),
        (4, 5, 1),
        (4, 4, 0),
        (4, 2, 0),
    ],
)
def test_a_chain_that_is_always_the_same_gets_no_longer_than_can_be_verified(
    num_decoding: int, max_rows: int, expected: int
) -> None:
    shape = FixedDrafts(DraftShape(5)).choose(num_decoding, max_rows)
    assert (shape.depth if shape is not None else 0) == expected


def test_a_tree_that_is_always_the_same_is_cut_by_who_verifies_it() -> None:
    """Of a smaller one other guesses would be the best."""
    tree = DraftShape(4, branching=3, num_nodes=9)
    assert FixedDrafts(tree).choose(4, 20) is tree
    assert FixedDrafts(tree).choose(4, 4) is None


@pytest.mark.parametrize("limit", ["max_tokens", "max_model_tokens"])
def test_nothing_is_guessed_beyond_the_last_token_that_a_request_may_get(
    guessing_bench: Callable[..., Any], limit: str
) -> None:
    num_new = 6
    bench = guessing_bench(chain([1] * 4), max_model_tokens=8 + num_new if limit == "max_model_tokens" else None)
    request = bench.add("a", 8, num_new if limit == "max_tokens" else None)
    depths, may_draft = [], []
    while request.num_output_tokens < num_new:
        (run,) = bench.step().runs
        depths.append(len(run.draft or ()))
        may_draft.append(run.may_draft)
    assert depths == [0, 4, 3, 2, 1, 0]  # with five tokens left, four guesses and the one after them
    assert may_draft == [True] * 4 + [False] * 2


def test_a_tree_is_cut_before_its_first_guess_that_is_too_deep() -> None:
    tree = DraftTree((5, 6, 7, 8), (-1, -1, 0, 2))
    assert [len(tree.no_deeper(depth)) for depth in range(5)] == [0, 2, 3, 4, 4]


def test_what_one_does_not_want_is_for_the_others() -> None:
    assert even_shares([1, 9, 9], 9) == [1, 4, 4]
    assert even_shares([5, 5, 5], 100) == [5, 5, 5]
    assert sum(even_shares([3] * 8, 5)) == 5
    assert even_shares([], 4) == []
