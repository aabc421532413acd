"""Guesses that do come true, on real kernels: an answer ends where it would without them, and says the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from agreeing_draft import STRIDE, save_agreeable_target, save_agreeing_draft

from eagleray import LLM, SamplingParams
from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.errors import ConfigError
from eagleray.engine.engine import StepOutcome
from eagleray.engine.request_output import CompletionOutput
from eagleray.text.fake import FIRST_BYTE_ID, save_byte_tokenizer

TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
DEPTH = 4
CHAIN = {"num_speculative_tokens": DEPTH}
TREE = {"num_speculative_tokens": DEPTH, "tree_branching": 2, "tree_nodes": 9}
METHODS: dict[str, dict[str, Any]] = {
    "eagle3, tree": {"method": "eagle3", **TREE},
    "medusa, tree": {"method": "medusa", **TREE},
    "early exit, chain": {"method": "early_exit", "early_exit_layers": 2, **CHAIN},
}
PROMPT = [*range(200, 220), 35]  # the letters of ASCII come next, each with the code of the one before and ``STRIDE``
FULL = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_agreeable_target(folder / "target", TARGET, seed=1)
    save_byte_tokenizer(folder / "target")
    for method in ("eagle3", "medusa"):
        save_agreeing_draft(folder / method, method, folder / "target", seed=2)
    return folder


def new_llm(folder: Path, method: str | None, **settings: Any) -> LLM:
    speculation = None if method is None else {**METHODS[method], "adaptive": False}
    if speculation is not None and speculation["method"] != "early_exit":
        speculation["model"] = str(folder / speculation["method"])
    return LLM(folder / "target", num_threads=1, num_blocks=64, speculation=speculation, **settings)


@pytest.fixture(scope="module")
def plain(folder: Path) -> LLM:
    return new_llm(folder, None)


@pytest.fixture(scope="module", params=METHODS)
def guessing(folder: Path, request: pytest.FixtureRequest) -> LLM:
    return new_llm(folder, request.param)


@contextmanager
def watched(llm: LLM) -> Iterator[list[StepOutcome]]:
    """What its steps bring."""
    outcomes: list[StepOutcome] = []
    take_step = llm.engine.step

    def watched_step() -> StepOutcome:
        outcomes.append(take_step())
        return outcomes[-1]

    llm.engine.step = watched_step  # type: ignore[method-assign]
    yield outcomes
    llm.engine.step = take_step  # type: ignore[method-assign]


def answer(llm: LLM, sampling: SamplingParams) -> CompletionOutput:
    """Its collector refuses tokens that come after the end, or twice."""
    (output,) = llm.generate([PROMPT], sampling)[0].outputs
    llm.engine.check_integrity()
    assert not llm.engine.has_work and llm.engine.kv.pool.num_free == llm.engine.kv.pool.num_blocks
    return output


def runs_of(llm: LLM, sampling: SamplingParams) -> list[range]:
    """Places in the answer of what single steps brought, where that was three tokens or more."""
    with watched(llm) as outcomes:
        answer(llm, sampling)
    outputs = [output for outcome in outcomes for output in outcome.outputs]
    runs = [range(output.position, output.position + len(output.token_ids)) for output in outputs]
    return [run for run in runs if len(run) > 2]


def changed(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, **changes})


ENDS: dict[str, Callable[[list[int], int], SamplingParams]] = {
    "stop token": lambda token_ids, at: changed(stop_token_ids=(token_ids[at],)),
    "stop string": lambda token_ids, at: changed(stop=(letters([token_ids[at]]),)),
    "stop string of two tokens": lambda token_ids, at: changed(stop=(letters(token_ids[at - 1 : at + 1]),)),
    "stop string that is shown": lambda token_ids, at: changed(
        stop=(letters([token_ids[at]]),), include_stop_str_in_output=True
    ),
    "max_tokens": lambda token_ids, at: changed(max_tokens=at + 1),
    "stop string after one that comes too early": lambda token_ids, at: changed(
        stop=(letters([token_ids[at - 1]]), letters([token_ids[at]])), min_tokens=at + 1
    ),
}  # fmt: skip


def letters(token_ids: list[int]) -> str:
    return "".join(chr(token_id - FIRST_BYTE_ID) for token_id in token_ids)


@pytest.mark.parametrize("end", ENDS)
def test_an_end_within_a_run_of_accepted_guesses_is_the_end_of_the_answer(plain: LLM, guessing: LLM, end: str) -> None:
    whole = answer(plain, FULL)
    assert answer(guessing, FULL) == whole
    places = [run[1] for run in runs_of(guessing, FULL) if run[-1] < 18]  # as far as the letters of ASCII go
    assert len(places) > 2
    for place in places:
        sampling = ENDS[end](whole.token_ids, place)
        ended = answer(guessing, sampling)
        assert ended == answer(plain, sampling)
        assert ended.token_ids == whole.token_ids[: place + 1]
        assert ended.finish_reason == ("length" if end == "max_tokens" else "stop")


def test_the_end_of_sequence_within_a_run_of_accepted_guesses_is_the_end_of_the_answer(
    plain: LLM, guessing: LLM
) -> None:
    """Whatever place in a run it has: answers begin one token later each."""
    eos = guessing.get_tokenizer().eos_token_ids[0]
    lengths = set()
    for count in range(6, 6 + DEPTH + 1):
        prompt = [*range(200, 220), (eos - STRIDE * count) % TARGET["vocab_size"]]
        sampling = SamplingParams(temperature=0.0, max_tokens=40)
        (ended,), (expected,) = (llm.generate([prompt], sampling)[0].outputs for llm in (guessing, plain))
        assert ended == expected
        assert (ended.token_ids[-1], ended.finish_reason) == (eos, "stop")
        lengths.add(len(ended.token_ids))
    assert len(lengths) == DEPTH + 1


DRAWN = {"temperature": 0.9, "top_k": 40, "seed": 11}
SCORED = {"temperature": 0.8, "seed": 5, "logprobs": 3, "frequency_penalty": 0.2}


@pytest.mark.parametrize("sampling", [{}, DRAWN], ids=["greedy", "drawn"])
def test_each_of_several_answers_is_the_one_that_it_is_without_guesses(
    plain: LLM, guessing: LLM, sampling: dict[str, Any]
) -> None:
    """They share blocks of the prompt, and guesses lie in blocks behind those."""
    several = changed(n=4, **sampling)
    with watched(guessing) as outcomes:
        answers = guessing.generate([PROMPT], several)[0].outputs
    assert answers == plain.generate([PROMPT], several)[0].outputs
    assert len({tuple(answer.token_ids) for answer in answers}) == (4 if sampling else 1)
    assert acceptance_of(outcomes).tokens_per_step > 1.5


def acceptance_of(outcomes: list[StepOutcome]) -> Acceptance:
    return total_acceptance(outcome.acceptance for outcome in outcomes) or Acceptance()


def test_log_probabilities_of_accepted_guesses_are_those_that_they_have_without_guesses(
    plain: LLM, guessing: LLM
) -> None:
    sampling = changed(**SCORED)
    with watched(guessing) as outcomes:
        ours = answer(guessing, sampling)
    theirs = answer(plain, sampling)
    assert acceptance_of(outcomes).num_accepted_tokens > 10
    assert ours.token_ids == theirs.token_ids
    assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-4)
    for mine, other in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
        assert list(mine) == list(other)
        assert [entry.rank for entry in mine.values()] == [entry.rank for entry in other.values()]
        assert [entry.logprob for entry in mine.values()] == pytest.approx(
            [entry.logprob for entry in other.values()], abs=1e-5
        )


def test_in_bfloat16_tokens_are_those_without_guesses(folder: Path) -> None:
    """With native kernels, which give a token the same logits whatever is in its batch."""
    samplings = [FULL, changed(**DRAWN), changed(**SCORED), changed(temperature=1.0, seed=7, top_p=0.9)]
    prompts = [[*PROMPT, 5 * index] for index in range(len(samplings))]

    def answers(method: str | None) -> tuple[list[list[int]], Acceptance]:
        try:
            llm = new_llm(folder, method, dtype="bfloat16", kernels="native")
        except ConfigError as error:
            pytest.skip(str(error))
        with watched(llm) as outcomes:
            outputs = llm.generate(prompts, samplings)
        return [output.outputs[0].token_ids for output in outputs], acceptance_of(outcomes)

    expected, _ = answers(None)
    for method in METHODS:
        found, acceptance = answers(method)
        assert found == expected
        assert acceptance.tokens_per_step > 1.5
