"""The engine counts what the executor verified."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.clock import ManualClock
from eagleray.core.config import EngineConfig
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution.fake import FakeExecutor, FakeStep
from eagleray.engine.scheduling.plan import StepPlan
from eagleray.engine.speculation.controller import DraftPolicy, FixedDrafts, StepTimes
from eagleray.engine.speculation.tree import DraftShape
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText

TOKENIZER = byte_tokenizer()
NUM_TOKENS = 41


def served(
    policy: DraftPolicy | None, guess_rate: float, num_requests: int = 1
) -> tuple[dict[str, Acceptance | None], Acceptance | None]:
    """What came of the guesses: by request, and over the engine's steps."""
    engine = Engine(
        FakeExecutor(guess_rate=guess_rate),
        EngineConfig(),
        ManualClock(),
        lambda spec: OutputText(TOKENIZER, spec.sampling, ()),
        policy,
    )
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, seed=3)
    for index in range(num_requests):
        engine.add(RequestSpec(request_id=f"{index}", token_ids=(1, 2, index), num_prompt_tokens=3, sampling=sampling))
    by_request: dict[str, Acceptance | None] = {}
    steps: list[Acceptance | None] = []
    while engine.has_work:
        outcome = engine.step()
        steps.append(outcome.acceptance)
        for output in outcome.outputs:
            by_request[output.request_id] = total_acceptance((by_request.get(output.request_id), output.acceptance))
    return by_request, total_acceptance(steps)


def test_guesses_that_all_come_true_bring_depth_plus_one_tokens_per_step() -> None:
    by_request, total = served(FixedDrafts(DraftShape(3)), guess_rate=1.0)
    assert (
        by_request["0"]
        == total
        == Acceptance(
            num_steps=10,  # the first token comes with the prompt, then four at a time
            num_draft_tokens=30,
            num_accepted_tokens=30,
            drafts_per_position=(10, 10, 10),
            accepted_per_position=(10, 10, 10),
        )
    )


def test_guesses_that_never_come_true_bring_one_token_per_step() -> None:
    by_request, _ = served(FixedDrafts(DraftShape(3)), guess_rate=0.0)
    acceptance = by_request["0"]
    assert acceptance is not None
    assert (acceptance.num_steps, acceptance.num_accepted_tokens) == (NUM_TOKENS - 1, 0)
    assert acceptance.num_drafts == NUM_TOKENS - 2  # none for the last token
    assert acceptance.accepted_per_position == ()


@pytest.mark.parametrize("shape", [DraftShape(3), DraftShape(2, branching=2, num_nodes=4)])
def test_a_step_counts_once_for_each_request_in_it(shape: DraftShape) -> None:
    by_request, total = served(FixedDrafts(shape), guess_rate=0.6, num_requests=3)
    assert total == total_acceptance(by_request.values())
    assert total is not None and 1.0 < total.tokens_per_step < 1.0 + shape.depth


def test_an_engine_that_does_not_guess_counts_nothing() -> None:
    assert served(None, guess_rate=1.0) == ({"0": None}, None)


class Following:
    """Implements ``DraftPolicy``: always the same, whatever there is room for, and keeps what it is told."""

    may_defer = False

    def __init__(self, shape: DraftShape) -> None:
        self.slots_needed = FixedDrafts(shape).slots_needed
        self.shape = shape
        self.times: list[StepTimes] = []
        self.gained: list[list[int]] = []
        self.num_guesses: list[int] = []

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        return self.shape

    def note_acceptance(self, shape: DraftShape, num_guesses: int, num_tokens: Sequence[int]) -> None:
        self.num_guesses.append(num_guesses)
        self.gained.append(list(num_tokens))

    def note_times(self, times: StepTimes) -> int:
        self.times.append(times)
        return 0


def engine_with(
    policy: DraftPolicy, executor: FakeExecutor, clock: ManualClock | None = None, **settings: int
) -> Engine:
    clock = clock or ManualClock()
    return Engine(
        executor, EngineConfig(**settings), clock, lambda spec: OutputText(TOKENIZER, spec.sampling, ()), policy
    )


def new_spec(request_id: str, max_tokens: int = 16) -> RequestSpec:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=3)
    return RequestSpec(request_id=request_id, token_ids=(1, 2, 3), num_prompt_tokens=3, sampling=sampling)


def test_a_step_without_guesses_after_a_hand_over_does_not_count_as_refusal() -> None:
    policy, executor = Following(DraftShape(3)), FakeExecutor(guess_rate=1.0)
    engine = engine_with(policy, executor)
    engine.add(new_spec("here already"))
    engine.step()
    spec = new_spec("handed over")
    engine.reserve(spec)
    engine.commit("handed over", 0, tuple(executor.continuation(spec, 1)), transfer_s=0.0)
    while engine.has_work:
        engine.step()
    assert {count for gained in policy.gained for count in gained} == {4}
    assert policy.num_guesses == [3 * len(gained) for gained in policy.gained]  # nor as guesses that were not found


def test_what_a_step_takes_beside_computing_is_told_but_for_the_time_without_work() -> None:
    clock, policy = ManualClock(), Following(DraftShape(3))
    engine = engine_with(policy, FakeExecutor(guess_rate=0.0), clock)
    for request_id in ("0", "1"):
        engine.add(new_spec(request_id, max_tokens=6))
        while engine.has_work:
            engine.step()
            clock.advance(0.25)  # as if what comes between two steps took so long
        clock.advance(100.0)
    assert {times.outside_s for times in policy.times} == {0.25}


def test_guesses_cut_for_want_of_budget_do_not_count_as_refused() -> None:
    policy = Following(DraftShape(3))
    engine = engine_with(policy, FakeExecutor(guess_rate=1.0), max_num_batched_tokens=8)
    for index in range(4):
        engine.add(new_spec(str(index), max_tokens=16 * (1 + index)))  # in the end there is room for all guesses
    while engine.has_work:
        engine.step()
    assert policy.gained and {count for gained in policy.gained for count in gained} == {4}


class FindsNothing(FakeExecutor):
    """As text look-up does where nothing like it came before."""

    def submit(self, plan: StepPlan) -> FakeStep:
        result = super().submit(plan).result()
        result.drafts.clear()
        return FakeStep(lambda: result)


def test_where_no_guess_is_found_that_counts_as_none_that_came_true() -> None:
    policy = Following(DraftShape(3))
    engine = engine_with(policy, FindsNothing())
    engine.add(new_spec("a", max_tokens=10))
    while engine.has_work:
        engine.step()
    assert policy.gained == [[1]] * 8  # the first token comes with the prompt, and nothing is tried for the last
