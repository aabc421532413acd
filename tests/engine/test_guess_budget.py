"""Guesses take what known tokens leave of a step's budget, evenly, and no more than may come true."""

from __future__ import annotations

import pytest

from eagleray.core.block_hash import HashNamespace
from eagleray.core.config import EngineConfig
from eagleray.core.request import Request, RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.scheduling.kv_manager import KVManager
from eagleray.engine.scheduling.plan import StepPlan
from eagleray.engine.scheduling.scheduler import Scheduler
from eagleray.engine.scheduling.shares import even_shares
from eagleray.engine.speculation.controller import FixedDrafts
from eagleray.engine.speculation.tree import DraftShape, DraftTree, chain

BLOCK_SIZE_TOKENS, BUDGET, NUM_GUESSES = 16, 512, 48
TREE = DraftTree((1,) * NUM_GUESSES, (-1, -1, *(node // 2 for node in range(NUM_GUESSES - 2))))


class Bench:
    """A scheduler whose steps each sample one token and guess ``draft`` for whoever may be guessed for."""

    def __init__(self, draft: DraftTree = TREE, max_num_seqs: int = 32, max_model_tokens: int | None = None) -> None:
        config = EngineConfig(
            block_size_tokens=BLOCK_SIZE_TOKENS, max_num_seqs=max_num_seqs, max_num_batched_tokens=BUDGET
        )
        kv = KVManager(4096, BLOCK_SIZE_TOKENS, HashNamespace("model", BLOCK_SIZE_TOKENS, "layout").root)
        shape = DraftShape(max(draft.depths), 2, len(draft))
        self.scheduler, self.draft = Scheduler(config, kv, FixedDrafts(shape), max_model_tokens), draft

    def add(self, request_id: str, num_tokens: int, max_tokens: int | None = 500) -> Request:
        spec = RequestSpec(
            request_id=request_id,
            token_ids=tuple(num_tokens + place for place in range(num_tokens)),
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        )
        self.scheduler.add(request := Request(spec, 0.0))
        return request

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        for run, request in self.scheduler.runs_that_count(plan):
            if run.samples:
                request.token_ids.append(7)
            self.scheduler.note_computed(run, request, 0, self.draft if run.may_draft else None)
        return plan


def test_everybody_gets_a_token_each_step_and_a_like_share_of_guesses() -> None:
    bench = Bench()
    requests = [bench.add(str(index), 8) for index in range(16)]
    bench.step()
    for _ in range(60):
        plan = bench.step()
        shares = [len(run.draft) for run in plan.runs if run.draft is not None]
        assert len(shares) == 16 and sum(run.num_rows for run in plan.runs) == BUDGET
        assert max(shares) - min(shares) <= 1
    assert [request.num_output_tokens for request in requests] == [61] * 16


def test_a_prompt_that_comes_to_many_guesses_is_computed_all_the_same() -> None:
    bench = Bench()
    for index in range(16):
        bench.add(str(index), 8)
    bench.step()
    late = bench.add("late", 1000)
    later = bench.add("later", 100)
    rows = [sum(run.num_rows for run in bench.step().runs) for _ in range(6)]
    assert rows == [BUDGET] * 6
    assert late.num_output_tokens > 0 and later.num_output_tokens > 0


def test_prompts_that_have_no_seat_take_nothing_from_guesses() -> None:
    bench = Bench(max_num_seqs=16)
    for index in range(20):
        bench.add(str(index), 8)
    bench.step()
    assert sum(len(run.draft or ()) for run in bench.step().runs) == BUDGET - 16


@pytest.mark.parametrize("limit", ["max_tokens", "max_model_tokens"])
def test_nothing_is_guessed_beyond_the_last_token_that_a_request_may_get(limit: str) -> None:
    num_new = 6
    bench = Bench(chain([1] * 4), max_model_tokens=8 + num_new if limit == "max_model_tokens" else None)
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
