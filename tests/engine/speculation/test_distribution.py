"""Both rules of verification draw from the target's own distribution, whatever is guessed: chi-square tests.

Target and guesser are tables of logits over six tokens, by the last two tokens, so the probability of every answer of
three tokens is known exactly. Answers are drawn as an engine draws them: a first token without guesses, then guesses
with the noise of the positions they are for, verified, until there are three tokens; what a refusal leaves is guessed
again with the same noise. Everything between the tables and the tokens is the code that serves.

Power. With n answers, a shift of the distribution p by d, cell by cell, has noncentrality n * sum(d^2 / p), which is at
least n * (sum |d|)^2, whatever the cells. A shift of one percent, sum |d| = 2 %, has at least 80 with the 200,000
answers of the slow tests, where single tokens (5 degrees of freedom) differ from 20.5 on and pairs (35) from 66.6 on,
at 0.1 %. The 30,000 by default find what is grossly wrong; one percent finds ``test_distribution_of_rejection.py`` in
single tokens, ``test_distribution_of_walks.py`` in walks, and ``test_distribution_of_engine.py``, among the slow tests,
through the engine. Seeds are fixed, so a run that passes passes always.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from token_tables import (
    BIASED_AND_CUT_OFF,
    CHAIN,
    EVERY_TOKEN,
    NUM_NEW_TOKENS,
    PROMPT,
    SIGNIFICANCE,
    SOME_TOKENS,
    TARGET,
    TREE,
    TableGuesser,
    answer_probabilities,
    p_values,
)
from torch import Tensor

from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.execution import runner
from eagleray.engine.execution.sampler import Choice, TokenRule, build_sampling_batch, choices_of, choose_tokens
from eagleray.engine.execution.verified import VerifiedRun
from eagleray.engine.scheduling.plan import ScheduledRun
from eagleray.engine.speculation import growth
from eagleray.engine.speculation.growth import GrowDrafts, draw_chains, grow_trees
from eagleray.engine.speculation.noise import ChoiceNoise
from eagleray.engine.speculation.rejection import choose_by_rejection
from eagleray.engine.speculation.tree import DraftShape, DraftTree
from eagleray.kernels.sampling.api import sample_tokens
from eagleray.kernels.sampling.batch import SamplingBatch

NUM_ANSWERS, NUM_OFTEN, BATCH_SIZE = 30_000, 200_000, 2_000

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Method:
    """How guesses are made and verified."""

    rule: TokenRule
    grow: GrowDrafts = grow_trees
    shape: DraftShape = CHAIN
    sampling: Mapping[str, Any] = field(default_factory=dict)
    guessed_V: Tensor = EVERY_TOKEN
    num_candidates: int = 64

    def guess(self, runs: Sequence[VerifiedRun]) -> list[DraftTree]:
        last_two = torch.tensor([run.token_ids(run.num_known - 2, run.num_known) for run in runs])
        return self.grow(TableGuesser(last_two, self.guessed_V), self.shape, ChoiceNoise.of(runs, "cpu"))

    def verify(self, runs: Sequence[ScheduledRun]) -> list[VerifiedRun]:
        choices = [choices_of(run) for run in runs]
        flat = list(itertools.chain.from_iterable(choices))
        rows = torch.tensor([choice.history[-2:] for choice in flat])
        logits = TARGET[rows[:, 0], rows[:, 1]]
        chosen = iter(self.rule(logits, build_sampling_batch(flat, logits.shape[1], "cpu"), flat).tolist())
        return [runner._walk(run, 0, [next(chosen) for _ in own]) for run, own in zip(runs, choices, strict=True)]


def draw_answers(method: Method, count: int) -> Counter[tuple[int, ...]]:
    """How often each answer of three tokens came; each request has a seed of its own."""
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(3)).tolist()
    requests = (new_run(PROMPT, SamplingParams(seed=seed, **method.sampling)) for seed in seeds)
    answers: Counter[tuple[int, ...]] = Counter()
    while runs := list(itertools.islice(requests, BATCH_SIZE)):
        while runs:
            verified = method.verify(runs)
            answers.update(answer_of(run) for run in verified if has_ended(run))
            verified = [run for run in verified if not has_ended(run)]
            drafts = method.guess(verified) if verified else []
            runs = [
                new_run(run.token_ids(0, run.num_known), run.run.spec.sampling, draft)
                for run, draft in zip(verified, drafts, strict=True)
            ]
    return answers


def new_run(known: Sequence[int], sampling: SamplingParams, draft: DraftTree | None = None) -> ScheduledRun:
    spec = RequestSpec(request_id="", token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=sampling)
    return ScheduledRun(spec, known, len(known) - 1, 1, (), samples=True, draft=draft)


def has_ended(run: VerifiedRun) -> bool:
    return run.num_known >= len(PROMPT) + NUM_NEW_TOKENS


def answer_of(run: VerifiedRun) -> tuple[int, ...]:
    return tuple(run.token_ids(len(PROMPT), len(PROMPT) + NUM_NEW_TOKENS))


# ---- the rules


def certain_chains(guesser: TableGuesser, shape: DraftShape, noise: Any) -> list[DraftTree]:
    """The guesser's best, whatever the noise: text look-up is such a guesser."""
    return grow_trees(guesser, shape)


TARGET_TOKEN = partial(choose_tokens, sample_tokens)
REJECTION = partial(choose_by_rejection, sample_tokens)
PENALISED = {
    "temperature": 0.8, "presence_penalty": 0.6, "frequency_penalty": 0.3, "logit_bias": {1: 0.9, 5: -0.4},
    "repetition_penalty": 1.2, "top_p": 0.9, "min_p": 0.05,
}  # fmt: skip
TRUNCATED = {"temperature": 1.3, "top_k": 4, "top_p": 0.95}
METHODS = {
    "target token, chain": Method(TARGET_TOKEN),
    "target token, tree": Method(TARGET_TOKEN, shape=TREE),
    "target token, tree, penalties": Method(TARGET_TOKEN, shape=TREE, sampling=PENALISED),
    "target token, truncated": Method(TARGET_TOKEN, sampling=TRUNCATED),
    "target token, tree, biased and cut off": Method(TARGET_TOKEN, shape=TREE, sampling=BIASED_AND_CUT_OFF),
    "rejection, drawn guesses": Method(REJECTION, draw_chains),
    "rejection, certain guesses": Method(REJECTION, certain_chains),
    "rejection, penalties": Method(REJECTION, draw_chains, sampling=PENALISED),
    "rejection, truncated": Method(REJECTION, draw_chains, sampling=TRUNCATED),
    "rejection, biased and cut off": Method(REJECTION, draw_chains, sampling=BIASED_AND_CUT_OFF),
    "rejection, the best of some tokens": Method(REJECTION, draw_chains, guessed_V=SOME_TOKENS, num_candidates=3),
}


MAIN = (
    "target token, tree",
    "target token, truncated",
    "rejection, drawn guesses",
    "rejection, penalties",
)


OFTEN = (
    "target token, tree, biased and cut off",
    "rejection, drawn guesses",
    "rejection, biased and cut off",
    "rejection, the best of some tokens",
)


def p_values_of(method: Method, count: int) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, "_DRAWN_CANDIDATES", method.num_candidates)
        answers = draw_answers(method, count)
    return p_values(answers, answer_probabilities(SamplingParams(**method.sampling)))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, NUM_ANSWERS) for name in MAIN),
        *(
            pytest.param(name, NUM_OFTEN if name in OFTEN else NUM_ANSWERS, marks=pytest.mark.slow)
            for name in METHODS
            if name in OFTEN or name not in MAIN
        ),
    ],
)
def test_answers_have_the_targets_own_distribution(name: str, count: int) -> None:
    found = p_values_of(METHODS[name], count)
    assert min(found.values()) > SIGNIFICANCE, found


# ---- rules that are wrong in one point each: the same statistics refuse them


def assert_found_out(method: Method) -> None:
    found = p_values_of(method, NUM_ANSWERS // 3)
    assert min(found.values()) < SIGNIFICANCE, found


def one_noise_for_all_positions(logits: Tensor, sampling: SamplingBatch, choices: Sequence[Choice]) -> Tensor:
    of_first = [replace(choice, guessed=()) for choice in choices]
    return sample_tokens(logits, build_sampling_batch(of_first, logits.shape[1], "cpu"))


def whatever_is_guessed(logits: Tensor, sampling: SamplingBatch, choices: Sequence[Choice]) -> Tensor:
    own = sample_tokens(logits, sampling)
    guessed = [choice.guess.token_id if choice.guess else token for choice, token in zip(choices, own, strict=True)]
    return torch.tensor(guessed)


@pytest.mark.parametrize("wrong", [one_noise_for_all_positions, whatever_is_guessed])
def test_a_wrong_rule_of_the_targets_own_token_is_found_out(wrong: TokenRule) -> None:
    assert_found_out(Method(wrong))


def test_a_walk_down_the_likeliest_branch_whatever_the_target_chose_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "accepted_nodes", lambda tree, chosen: tree.path(len(tree) - 1)[:1])
    assert_found_out(Method(TARGET_TOKEN, shape=TREE))
