"""While a step computes, the text of the one before is made: what may happen meanwhile, in every order, on purpose."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from eagleray.core.clock import ManualClock
from eagleray.core.config import EngineConfig
from eagleray.core.request import FinishReason, RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine, StepOutcome
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.engine.scheduling.plan import StepPlan, StepResult
from eagleray.engine.speculation.controller import AdaptiveDrafts, StepTimes
from eagleray.engine.speculation.tree import DraftShape
from eagleray.text.fake import FIRST_BYTE_ID, byte_tokenizer
from eagleray.text.output import OutputText, TokenText

BLOCK_SIZE_TOKENS, NUM_BLOCKS = 4, 8
TOKENIZER = byte_tokenizer()
PROMPT = tuple(range(FIRST_BYTE_ID + ord("a"), FIRST_BYTE_ID + ord("a") + 6))


class LateExecutor:
    """Computes a step as late as possible, when somebody waits for it: whatever was done to its blocks in the meantime
    shows. ``failure`` is what the next step that is waited for meets."""

    def __init__(self) -> None:
        self._executor = FakeExecutor(num_blocks=NUM_BLOCKS, block_size_tokens=BLOCK_SIZE_TOKENS, max_model_tokens=32)
        self.layout, self.model_identity = self._executor.layout, self._executor.model_identity
        self.draft_identity = self._executor.draft_identity
        self.num_blocks, self.num_host_blocks, self.max_model_tokens = NUM_BLOCKS, 0, 32
        self.num_begun = self.num_over = 0
        self.plan = StepPlan()  # the last one
        self.failure: Exception | None = None

    def submit(self, plan: StepPlan) -> LateStep:
        assert not self.is_computing, "a step begins before the one before is over"
        self.num_begun += 1
        self.plan = plan
        return LateStep(self, plan)

    @property
    def is_computing(self) -> bool:
        return self.num_begun > self.num_over

    def compute(self, plan: StepPlan) -> StepResult:
        self.num_over += 1
        if self.failure is not None:
            raise self.failure
        return self._executor.submit(plan).result()

    def text(self, spec: RequestSpec, num_tokens: int) -> str:
        """What the request's first tokens are as text."""
        return "".join(TOKENIZER.token_text(token_id) for token_id in self._executor.continuation(spec, num_tokens))


class LateStep:
    def __init__(self, executor: LateExecutor, plan: StepPlan) -> None:
        self._executor, self._plan = executor, plan

    def result(self) -> StepResult:
        return self._executor.compute(self._plan)


@pytest.fixture
def executor() -> LateExecutor:
    return LateExecutor()


@pytest.fixture
def engine(executor: LateExecutor) -> Engine:
    return Engine(executor, EngineConfig(), ManualClock(), lambda spec: OutputText(TOKENIZER, spec.sampling, PROMPT))


def new_spec(request_id: str, stop: tuple[str, ...] = (), max_tokens: int = 20, seed: int = 5) -> RequestSpec:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, stop=stop)
    return RequestSpec(request_id=request_id, token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=sampling)


def spec_that_stops(executor: LateExecutor, request_id: str, num_tokens: int) -> RequestSpec:
    """Ends with the text of its token number ``num_tokens``, which comes nowhere before."""
    for seed in range(1000):
        text = executor.text(new_spec(request_id, seed=seed), num_tokens)
        if text.isascii() and text.isprintable() and text[-1] not in text[:-1]:
            return new_spec(request_id, stop=(text[-1],), seed=seed)
    raise AssertionError("no seed gives such a text")


def in_flight(executor: LateExecutor) -> list[str]:
    return [run.spec.request_id for run in executor.plan.runs] if executor.is_computing else []


def reported(outcome: StepOutcome) -> list[str]:
    return [output.request_id for output in outcome.outputs]


def test_the_next_step_computes_while_text_is_made(executor: LateExecutor) -> None:
    begun_at_push: list[int] = []

    class Text(OutputText):
        def push(self, token_id: int) -> TokenText:
            begun_at_push.append(executor.num_begun)
            return super().push(token_id)

    engine = Engine(executor, EngineConfig(), ManualClock(), lambda spec: Text(TOKENIZER, spec.sampling, PROMPT))
    engine.add(new_spec("a", max_tokens=3))
    outputs = [output for _ in range(3) for output in engine.step().outputs]
    assert begun_at_push == [2, 3, 3], "the text of step k is made after step k + 1 has begun, if there is one"
    assert [output.position for output in outputs] == [0, 1, 2] and outputs[-1].finish_reason is FinishReason.LENGTH
    assert not executor.is_computing and not engine.has_work


def test_what_guesses_brought_and_took_is_told_while_the_next_step_computes(executor: LateExecutor) -> None:
    told: list[tuple[str, int]] = []

    class Policy(AdaptiveDrafts):
        def choose(self, num_decoding: int, max_rows: int) -> DraftShape:
            told.append(("chosen", executor.num_begun))
            return DraftShape(1)

        def note_acceptance(self, shape: DraftShape, num_guesses: int, num_tokens: Sequence[int]) -> None:
            told.append(("acceptance", executor.num_begun))

        def note_times(self, times: StepTimes) -> int:
            told.append(("times", executor.num_begun))
            return 0

    policy = Policy([DraftShape(1)], has_network=True)
    new_text = lambda spec: OutputText(TOKENIZER, spec.sampling, PROMPT)  # noqa: E731
    engine = Engine(executor, EngineConfig(), ManualClock(), new_text, policy)
    engine.add(new_spec("a", max_tokens=20))
    for _ in range(3):
        engine.step()
    # The first step computes the prompt and guesses; what the second one took is told when the third has been chosen.
    assert told == [
        *(("chosen", begun) for begun in (0, 1, 2)),
        ("acceptance", 3),
        ("times", 3),
        ("chosen", 3),
        ("acceptance", 4),
        ("times", 4),
    ]


def test_a_stop_string_ends_a_request_that_is_in_the_step_under_way_and_nothing_of_that_step_is_kept(
    engine: Engine, executor: LateExecutor
) -> None:
    engine.add(spec_that_stops(executor, "stops", 3))
    engine.add(new_spec("goes on"))
    outcomes = [engine.step() for _ in range(3)]
    last = next(output for output in outcomes[2].outputs if output.request_id == "stops")
    assert last.finish_reason is FinishReason.STOP and last.texts == ("",)
    assert in_flight(executor) == ["stops", "goes on"]
    assert engine.state_of("stops") is None
    engine.check_integrity()
    assert reported(engine.step()) == ["goes on"]
    assert in_flight(executor) == ["goes on"]
    engine.check_integrity()
    engine.end("goes on")
    assert engine.kv.pool.num_free == NUM_BLOCKS


def test_a_request_that_is_aborted_while_a_step_computes_it_is_reported_no_more(
    engine: Engine, executor: LateExecutor
) -> None:
    for request_id in ("aborted", "goes on"):
        engine.add(new_spec(request_id))
    engine.step()
    assert in_flight(executor) == ["aborted", "goes on"]
    assert engine.end("aborted")
    engine.check_integrity()
    outcome = engine.step()
    assert reported(outcome) == ["goes on"] and outcome.outputs[0].position == 1
    assert in_flight(executor) == ["goes on"]
    engine.check_integrity()


def test_a_request_that_is_aborted_between_its_step_and_the_report_is_not_reported(engine: Engine) -> None:
    engine.add(new_spec("a", max_tokens=1))
    assert engine.begin()
    engine.wait()
    assert engine.state_of("a") is None and engine.end("a")
    outcome = engine.report()
    assert outcome is not None and outcome.outputs == []
    assert engine.report() is None


def test_an_id_can_be_used_again_when_its_last_output_has_been_reported_and_not_before(engine: Engine) -> None:
    engine.add(new_spec("a", max_tokens=1))
    engine.begin()
    engine.wait()
    with pytest.raises(Exception, match="already being served"):
        engine.add(new_spec("a"))
    engine.report()
    engine.add(new_spec("a"))


def test_a_request_that_takes_the_place_of_an_aborted_one_gets_nothing_of_its_steps(engine: Engine) -> None:
    spec = new_spec("a")
    engine.add(spec)
    assert engine.begin()
    engine.wait()
    assert engine.end("a")
    engine.add(spec)
    outcome = engine.report()
    assert outcome is not None and outcome.outputs == [], "that step was for the one before"
    assert engine.begin()
    assert engine.end("a")
    engine.add(spec)
    assert engine.step().outputs == [], "and so was that one"
    assert engine.step().outputs[0].position == 0
    engine.check_integrity()


def test_a_step_that_fails_loses_nothing_of_the_one_before(engine: Engine, executor: LateExecutor) -> None:
    engine.add(new_spec("a"))
    assert [output.position for output in engine.step().outputs] == [0]
    executor.failure = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="gone"):
        engine.step()
    engine.check_integrity()
    assert engine.end("a") and engine.kv.pool.num_free == NUM_BLOCKS


def test_an_executor_that_takes_no_step_any_more_loses_nothing_of_the_last_one(
    engine: Engine, executor: LateExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.add(new_spec("a"))
    engine.begin()
    engine.wait()
    monkeypatch.setattr(executor, "submit", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.begin()
    outcome = engine.report()
    assert outcome is not None and [output.position for output in outcome.outputs] == [0]


def test_blocks_of_a_request_that_ended_are_not_reserved_before_the_step_that_uses_them_is_over(
    engine: Engine, executor: LateExecutor
) -> None:
    engine.add(spec_that_stops(executor, "stops", 3))
    for _ in range(3):
        engine.step()
    used = {block_id for run in executor.plan.runs for block_id in run.block_ids}
    assert in_flight(executor) == ["stops"] and engine.state_of("stops") is None
    reservation = engine.reserve(
        RequestSpec(
            request_id="r", token_ids=(9,) * (NUM_BLOCKS * BLOCK_SIZE_TOKENS - 1), num_prompt_tokens=1,
            sampling=SamplingParams(),
        )
    )  # fmt: skip
    assert reservation is not None and used <= set(reservation.block_ids), "there was no other room"
    assert not executor.is_computing


def test_a_hand_over_that_ends_with_its_first_token_computes_nothing_more(
    engine: Engine, executor: LateExecutor
) -> None:
    engine.add(spec_that_stops(executor, "a", 1), output_limit=1)
    outcome = engine.step()
    assert outcome.progress[0].is_finished and outcome.outputs[0].finish_reason is FinishReason.STOP
    assert not executor.is_computing
    assert outcome.progress[0].num_computed_tokens == len(PROMPT)
