"""Verification that is wrong in one point each changes answers: what compares them with those of a model that does not
guess finds it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agreeing_draft import save_agreeable_target, save_agreeing_draft
from watching import watched

from eagleray import LLM, SamplingParams
from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.engine.execution import batch, runner
from eagleray.engine.speculation.tree import ROOT, DraftTree
from eagleray.kernels.paged_attention.tree import TreeRun, tree_run
from eagleray.text.fake import save_byte_tokenizer

TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
TREE = {"num_speculative_tokens": 4, "tree_branching": 2, "tree_nodes": 9}
METHODS: dict[str, dict[str, Any]] = {
    "eagle3, tree": {"method": "eagle3", **TREE},
    "medusa, tree": {"method": "medusa", **TREE},
    "eagle3, chain": {"method": "eagle3", "num_speculative_tokens": 4},
    "early exit, chain": {"method": "early_exit", "early_exit_layers": 2, "num_speculative_tokens": 4},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.9, "top_k": 40, "seed": 11},
    "steered": {
        "temperature": 0.9, "seed": 15, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.2,
        "logit_bias": {55: 2.0, 60: -100.0},
    },
}  # fmt: skip
PROMPTS = [[*range(200 + index, 220), 30 + 11 * index] for index in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_agreeable_target(folder / "target", TARGET, seed=1, say_of_context=0.6)
    save_byte_tokenizer(folder / "target")
    for method in ("eagle3", "medusa"):
        save_agreeing_draft(folder / method, method, folder / "target", seed=2)
    return folder


def new_llm(folder: Path, method: dict[str, Any] | None) -> LLM:
    speculation = None if method is None else {**method, "adaptive": False}
    if speculation is not None and speculation["method"] != "early_exit":
        speculation["model"] = str(folder / speculation["method"])
    return LLM(folder / "target", num_threads=1, num_blocks=256, speculation=speculation)


def answers_of(llm: LLM) -> tuple[dict[str, list[list[int]]], Acceptance]:
    """(Tokens by way to sample, what came of the guesses)."""
    samplings = [SamplingParams(max_tokens=40, ignore_eos=True, **fields) for fields in SAMPLING.values()]
    with watched(llm) as outcomes:
        outputs = llm.generate(PROMPTS * len(samplings), [sampling for sampling in samplings for _ in PROMPTS])
    tokens = iter([output.outputs[0].token_ids for output in outputs])
    acceptance = total_acceptance(outcome.acceptance for outcome in outcomes) or Acceptance()
    return {name: [next(tokens) for _ in PROMPTS] for name in SAMPLING}, acceptance


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[list[int]]]:
    return answers_of(new_llm(folder, None))[0]


def first_children(tree: DraftTree, chosen: Sequence[int]) -> list[int]:
    accepted, here = [], ROOT
    for node, parent in enumerate(tree.parents):
        if parent == here:
            accepted.append(node)
            here = node
    return accepted


def causal_run(parents: Sequence[int]) -> TreeRun:
    return replace(tree_run(parents), masks=tuple((2 << token) - 1 for token in range(len(parents))))


def keep_nothing(model_runner: runner.ModelRunner, verified: object) -> None:
    pass


Wrong = Callable[[pytest.MonkeyPatch], None]


def wrongly(owner: object, name: str, replacement: object) -> Wrong:
    return lambda patch: patch.setattr(owner, name, replacement)


FIRST = "the first guess is accepted, whatever the target chose"
WRONG: dict[str, Wrong] = {
    FIRST: wrongly(runner, "accepted_nodes", first_children),
    "KV of accepted guesses stays where it was": wrongly(runner.ModelRunner, "_keep_accepted", keep_nothing),
    "guesses see those of other branches": wrongly(batch, "tree_run", causal_run),
}
OF_TREES = [name for name in WRONG if name != FIRST]  # in a chain there are no other branches, and KV is in its place


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        *((method, FIRST) for method in METHODS),
        *((method, wrong) for method in ("eagle3, tree", "medusa, tree") for wrong in OF_TREES),
    ],
)
def test_answers_that_are_those_without_guesses_are_others_when_verification_is_wrong_in_one_point(
    folder: Path, expected: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch, method: str, wrong: str
) -> None:
    llm = new_llm(folder, METHODS[method])
    right, acceptance = answers_of(llm)
    assert right == expected
    assert acceptance.tokens_per_step > 1.25
    WRONG[wrong](monkeypatch)
    found, acceptance = answers_of(llm)
    assert acceptance.num_accepted_tokens > 100
    assert [name for name in SAMPLING if found[name] == expected[name]] == []
