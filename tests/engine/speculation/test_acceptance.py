"""The engine counts what the executor verified."""

from __future__ import annotations

import pytest

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.clock import ManualClock
from eagleray.core.config import EngineConfig
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.engine.speculation.controller import DraftPolicy, FixedDrafts
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
    assert (acceptance.num_steps, acceptance.num_drafts, acceptance.num_accepted_tokens) == (NUM_TOKENS - 1,) * 2 + (0,)
    assert acceptance.accepted_per_position == ()


@pytest.mark.parametrize("shape", [DraftShape(3), DraftShape(2, branching=2, num_nodes=4)])
def test_a_step_counts_once_for_each_request_in_it(shape: DraftShape) -> None:
    by_request, total = served(FixedDrafts(shape), guess_rate=0.6, num_requests=3)
    assert total == total_acceptance(by_request.values())
    assert total is not None and 1.0 < total.tokens_per_step < 1.0 + shape.depth


def test_an_engine_that_does_not_guess_counts_nothing() -> None:
    assert served(None, guess_rate=1.0) == ({"0": None}, None)
