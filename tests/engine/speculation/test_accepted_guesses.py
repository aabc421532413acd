"""Guesses that do come true, on real kernels: an answer ends where it would without them, and says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agreeing_draft import STRIDE, save_agreeable_target, save_agreeing_draft
from watching import watched

from eagleray import LLM, SamplingParams
from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.errors import ConfigError
from eagleray.engine.engine import StepOutcome
from eagleray.engine.request_output import CompletionOutput
from eagleray.engine.speculation.tree import MAX_NODES
from eagleray.text.fake import FIRST_BYTE_ID, save_byte_tokenizer

TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
DEPTH = 4
CHAIN = {"num_speculative_tokens": DEPTH}
TREE = {"num_speculative_tokens": DEPTH, "tree_branching": 2, "tree_nodes": 9}
METHODS: dict[str, dict[str, Any]] = {
    "eagle3, tree": {"method": "eagle3", **TREE},
    "medusa, tree": {"method": "medusa", **TREE},
    "early exit, chain": {"method": "early_exit", "early_exit_layers": 2, **CHAIN},
    "ngram, chain": {"method": "ngram", **CHAIN},
}


def passage(first: int, length: int) -> list[int]:
    """What the target says after ``first`` when nothing but that has a say."""
    return [(first + STRIDE * place) % TARGET["vocab_size"] for place in range(length)]


# The letters of ASCII come next, each with the code of the one before and ``STRIDE``. All of that can be looked up.
PROMPT = [*passage(35, 260), *range(200, 220), 35]
FULL = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_agreeable_target(folder / "target", TARGET, seed=1)
    save_byte_tokenizer(folder / "target")
    for method in ("eagle3", "medusa"):
        save_agreeing_draft(folder / method, method, folder / "target", seed=2)
    return folder


def new_llm(folder: Path, method: dict[str, Any] | None, **settings: Any) -> LLM:
    speculation = None if method is None else {**method, "adaptive": False}
    if speculation is not None and speculation["method"] not in ("early_exit", "ngram"):
        speculation["model"] = str(folder / speculation["method"])
    return LLM(folder / "target", num_threads=1, num_blocks=96, speculation=speculation, **settings)


@pytest.fixture(scope="module")
def plain(folder: Path) -> LLM:
    return new_llm(folder, None)


@pytest.fixture(scope="module", params=METHODS)
def guessing(folder: Path, request: pytest.FixtureRequest) -> LLM:
    return new_llm(folder, METHODS[request.param])


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
        begin = (eos - STRIDE * count) % TARGET["vocab_size"]
        prompt = [*passage(begin, 2 * count), *range(200, 220), begin]
        sampling = SamplingParams(temperature=0.0, max_tokens=40)
        (ended,), (expected,) = (llm.generate([prompt], sampling)[0].outputs for llm in (guessing, plain))
        assert ended == expected
        assert (ended.token_ids[-1], ended.finish_reason) == (eos, "stop")
        lengths.add(len(ended.token_ids))
    assert len(lengths) == DEPTH + 1


DRAWN = {"temperature": 0.9, "top_k": 40, "seed": 11}
SCORED = {"temperature": 0.8, "seed": 5, "logprobs": 3, "frequency_penalty": 0.2}
STEERED = {
    "temperature": 0.9, "seed": 15, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.2,
    "logit_bias": {55: 2.0, 60: -100.0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("sampling", "tokens_per_step"), [({}, 1.5), (DRAWN, 1.5), (STEERED, 1.25)], ids=["greedy", "drawn", "steered"]
)
def test_each_of_several_answers_is_the_one_that_it_is_without_guesses(
    plain: LLM, guessing: LLM, sampling: dict[str, Any], tokens_per_step: float
) -> None:
    """They share blocks of the prompt, and guesses lie in blocks behind those."""
    several = changed(n=4, **sampling)
    with watched(guessing) as outcomes:
        answers = guessing.generate([PROMPT], several)[0].outputs
    assert answers == plain.generate([PROMPT], several)[0].outputs
    assert len({tuple(answer.token_ids) for answer in answers}) == (4 if sampling else 1)
    assert acceptance_of(outcomes).tokens_per_step > tokens_per_step


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
    nucleus = {"temperature": 1.0, "seed": 7, "top_p": 0.9}
    samplings = [FULL, *(changed(**fields) for fields in (DRAWN, SCORED, STEERED, nucleus))]
    prompts = [[*PROMPT, 5 * index] for index in range(len(samplings))]

    def answers(method: dict[str, Any] | None) -> tuple[list[list[int]], Acceptance]:
        try:
            llm = new_llm(folder, method, dtype="bfloat16", kernels="native")
        except ConfigError as error:
            pytest.skip(str(error))
        with watched(llm) as outcomes:
            outputs = llm.generate(prompts, samplings)
        return [output.outputs[0].token_ids for output in outputs], acceptance_of(outcomes)

    expected, _ = answers(None)
    for method in METHODS.values():
        found, acceptance = answers(method)
        assert found == expected
        assert acceptance.tokens_per_step > (1.25 if method["method"] == "ngram" else 1.5)


# How many guesses follow each one in Medusa's own tree (mc_sim_7b_63 of FasterDecoding/Medusa).
FOLLOWERS = {
    (): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1, (8,): 1, (9,): 1,
    (0, 0): 10, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1, (1, 0): 2, (2, 0): 1,
    (0, 0, 0): 2,
}  # fmt: skip


def test_medusas_published_tree_is_as_large_as_trees_may_be_and_is_served(folder: Path, plain: LLM) -> None:
    paths = [[*path, rank] for path, count in FOLLOWERS.items() for rank in range(count)]
    assert len(paths) == MAX_NODES
    llm = new_llm(folder, {"method": "medusa", "tree_paths": paths})
    with watched(llm) as outcomes:
        for sampling in (FULL, changed(**DRAWN), changed(**STEERED)):
            assert answer(llm, sampling) == answer(plain, sampling)
    acceptance = acceptance_of(outcomes)
    assert acceptance.num_draft_tokens > 0.8 * MAX_NODES * acceptance.num_steps  # fewer at the end of an answer
    assert acceptance.tokens_per_step > 1.5
