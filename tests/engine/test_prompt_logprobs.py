"""Log-probabilities of the prompt come out once, whole, with the first token, wherever that is sampled."""

from __future__ import annotations

import pytest

from eagleray.core.clock import ManualClock
from eagleray.core.config import EngineConfig
from eagleray.core.messages import TokenOutput
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText

TOKENIZER = byte_tokenizer()
PROMPT = tuple(range(40, 60))
SAMPLING = SamplingParams(max_tokens=3, seed=1, ignore_eos=True, prompt_logprobs=0)


@pytest.fixture
def engine() -> Engine:
    executor = FakeExecutor(num_blocks=32, block_size_tokens=4)
    config = EngineConfig(max_num_batched_tokens=7)
    return Engine(executor, config, ManualClock(), lambda spec: OutputText(TOKENIZER, spec.sampling, ()))


def new_spec(request_id: str, emitted: tuple[int, ...] = ()) -> RequestSpec:
    return RequestSpec(
        request_id=request_id, token_ids=PROMPT + emitted, num_prompt_tokens=len(PROMPT), sampling=SAMPLING
    )


def outputs_of(engine: Engine) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += engine.step().outputs
    return outputs


def assert_whole(output: TokenOutput) -> None:
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert tuple(entry.token_id for entry in output.prompt_logprobs if entry is not None) == PROMPT[1:]


def test_they_come_with_the_first_token_only(engine: Engine) -> None:
    engine.add(new_spec("a"))
    first, *others = outputs_of(engine)
    assert_whole(first)
    assert all(output.prompt_logprobs is None for output in others)


def test_they_are_computed_here_when_a_transfer_broke_off_before_the_first_token_came(engine: Engine) -> None:
    assert engine.reserve(new_spec("a")) is not None
    engine.commit("a", num_computed_tokens=8, token_ids=(), transfer_s=0.0)
    assert_whole(outputs_of(engine)[0])


def test_they_are_not_said_again_by_the_worker_that_takes_over(engine: Engine) -> None:
    sampled = tuple(FakeExecutor(block_size_tokens=4).continuation(new_spec("a"), 1))
    assert engine.reserve(new_spec("a")) is not None
    engine.commit("a", num_computed_tokens=0, token_ids=sampled, transfer_s=0.0)
    assert all(output.prompt_logprobs is None for output in outputs_of(engine))


def test_they_are_not_said_again_by_the_worker_that_resumes(engine: Engine) -> None:
    engine.add(new_spec("a", emitted=(7,)))
    assert all(output.prompt_logprobs is None for output in outputs_of(engine))
