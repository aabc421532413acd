"""Answers of hundreds of thousands of requests by the target's own token, grown and walked by what serves, have the
target's own distribution, and what is one percent off is found out: chi-square tests.

Power. With n answers, a shift of the distribution p by d, cell by cell, has noncentrality n * sum(d^2 / p), which is at
least n * (sum |d|)^2, whatever the cells. A shift of one percent, sum |d| = 2 %, has at least 160 with 400,000
answers: for single tokens (5 degrees of freedom, critical value 20.5 at 0.1 %) and for pairs (35 and 66.6) it is found
always. 100,000, by default, find two percent. Only the parameters of rows are made for many requests at once.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from token_tables import (
    BIASED_AND_CUT_OFF,
    CHAIN,
    GUESSER,
    NUM_NEW_TOKENS,
    PROMPT,
    SIGNIFICANCE,
    TARGET,
    TREE,
    VOCAB_SIZE,
    TableGuesser,
    answer_probabilities,
    next_probabilities,
    p_values,
)
from torch import Tensor

from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.execution import runner
from eagleray.engine.scheduling.plan import ScheduledRun
from eagleray.engine.speculation.growth import grow_trees
from eagleray.engine.speculation.noise import ChoiceNoise
from eagleray.engine.speculation.tree import DraftShape, DraftTree, fixed_tree
from eagleray.engine.speculation.verify import accepted_nodes
from eagleray.kernels.sampling.api import sample_tokens
from eagleray.kernels.sampling.batch import LogitBias, MinP, Penalties, RandomRows, SamplingBatch, TopKTopP

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_OFTEN, FEWER = 400_000, 100_000
REPEATED = {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
PATHS = fixed_tree([(0,), (1,), (0, 0), (0, 1), (1, 0)])


def draw_often(shape: DraftShape, sampling: SamplingParams, count: int) -> Counter[tuple[int, ...]]:
    """As ``draw_answers`` by the target's own token; rows have their parameters as tensors, for many requests."""
    seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(6))
    answers: Counter[tuple[int, ...]] = Counter()
    end = len(PROMPT) + NUM_NEW_TOKENS
    for seed_B in seeds.split(50_000):
        known, drafts = [PROMPT] * len(seed_B), None
        while known:
            chosen = choose_often(known, drafts, seed_B, sampling)
            known = list(map(walked, known, drafts or [None] * len(known), chosen))
            answers.update(tokens[len(PROMPT) : end] for tokens in known if len(tokens) >= end)
            going_on = [index for index, tokens in enumerate(known) if len(tokens) < end]
            known, seed_B = [known[index] for index in going_on], seed_B[going_on]
            drafts = guess_often(known, shape, seed_B, sampling) if known else None
    return answers


SPEC = RequestSpec(request_id="", token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=SamplingParams())


def walked(known: tuple[int, ...], draft: DraftTree | None, chosen: list[int]) -> tuple[int, ...]:
    run = ScheduledRun(SPEC, known, len(known) - 1, 1, (), samples=True, draft=draft)
    return known + runner._walk(run, 0, chosen).sampled


def guess_often(
    known: Sequence[tuple[int, ...]], shape: DraftShape, seed_B: Tensor, sampling: SamplingParams
) -> list[DraftTree]:
    position_B, zero_B = torch.tensor([len(tokens) for tokens in known]), torch.zeros_like(seed_B)
    temperature_B = torch.full_like(seed_B, sampling.temperature, dtype=torch.float32)
    noise = ChoiceNoise(temperature_B, temperature_B > 0, seed_B, zero_B, position_B)
    return grow_trees(TableGuesser(torch.tensor([tokens[-2:] for tokens in known])), shape, noise)


def choose_often(
    known: Sequence[tuple[int, ...]], drafts: list[DraftTree] | None, seed_B: Tensor, sampling: SamplingParams
) -> list[list[int]]:
    """The target's own tokens after the last known one, then after each guess."""
    histories_RH, lengths_R = histories(known, drafts)
    num_rows, at_once = len(lengths_R), torch.arange(len(lengths_R))
    last_two = histories_RH.gather(1, torch.stack((lengths_R - 2, lengths_R - 1), dim=1))
    history_rows, places = (torch.arange(histories_RH.shape[1]) < lengths_R[:, None]).nonzero(as_tuple=True)
    penalties = Penalties(
        at_once,
        torch.full((num_rows,), sampling.repetition_penalty),
        torch.full((num_rows,), sampling.presence_penalty),
        torch.full((num_rows,), sampling.frequency_penalty),
        history_rows,
        histories_RH[history_rows, places],
        places >= len(PROMPT),
    )
    seed_R = seed_B.repeat_interleave(num_rows // len(seed_B))
    temperature = torch.full((num_rows,), sampling.temperature)
    cut_off = top_k_top_p(sampling, num_rows), min_p(sampling, num_rows)
    rows = RandomRows(at_once, temperature, seed_R, torch.zeros_like(seed_R), lengths_R, *cut_off)
    logits, batch = TARGET[last_two[:, 0], last_two[:, 1]], SamplingBatch(bias(sampling, num_rows), penalties, rows)
    return sample_tokens(logits, batch).view(len(seed_B), -1).tolist()


def bias(sampling: SamplingParams, num_rows: int) -> LogitBias | None:
    if sampling.logit_bias is None:
        return None
    rows = torch.arange(num_rows).repeat_interleave(len(sampling.logit_bias))
    token_ids, values = torch.tensor([*sampling.logit_bias]), torch.tensor([*sampling.logit_bias.values()])
    return LogitBias(rows, token_ids.repeat(num_rows), values.repeat(num_rows))


def top_k_top_p(sampling: SamplingParams, num_rows: int) -> TopKTopP | None:
    if not sampling.top_k and sampling.top_p == 1.0:
        return None
    at_once, top_k = torch.arange(num_rows), sampling.top_k or VOCAB_SIZE
    top_p = torch.full((num_rows,), sampling.top_p, dtype=torch.float64)
    return TopKTopP(at_once, torch.full_like(at_once, top_k), top_p, top_k)


def min_p(sampling: SamplingParams, num_rows: int) -> MinP | None:
    return MinP(torch.arange(num_rows), torch.full((num_rows,), sampling.min_p)) if sampling.min_p else None


def histories(known: Sequence[tuple[int, ...]], drafts: list[DraftTree] | None) -> tuple[Tensor, Tensor]:
    """(Tokens [R, H] before each row's choice, padded with zeros, their number [R]); a request's rows follow each
    other."""
    room = len(PROMPT) + NUM_NEW_TOKENS + TREE.depth
    lengths_BN = torch.tensor([len(tokens) for tokens in known])[:, None]
    tokens_BNH = torch.tensor([tokens + (0,) * (room - len(tokens)) for tokens in known])[:, None]
    if drafts is not None:
        guesses_BN = torch.tensor([draft.token_ids for draft in drafts])
        rows_B = torch.arange(len(known))
        for node, parents_B in enumerate(torch.tensor([draft.parents for draft in drafts]).T):
            own_BH, length_B = tokens_BNH[rows_B, parents_B + 1].clone(), lengths_BN[rows_B, parents_B + 1]
            own_BH[rows_B, length_B] = guesses_BN[:, node]
            tokens_BNH = torch.cat((tokens_BNH, own_BH[:, None]), dim=1)
            lengths_BN = torch.cat((lengths_BN, length_B[:, None] + 1), dim=1)
    return tokens_BNH.flatten(0, 1), lengths_BN.flatten()


OFTEN = {
    "chain": (CHAIN, {}),
    "tree": (TREE, {}),
    "tree, penalties": (TREE, REPEATED),
    "fixed tree": (PATHS, {}),
    "chain, penalties": (CHAIN, REPEATED),
    "tree, biased and cut off": (TREE, BIASED_AND_CUT_OFF),
}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, FEWER) for name in ("chain", "tree, penalties")),
        *(pytest.param(name, NUM_OFTEN, marks=pytest.mark.slow) for name in OFTEN),
    ],
)
def test_many_walked_answers_have_the_targets_own_distribution(name: str, count: int) -> None:
    shape, fields = OFTEN[name]
    sampling = SamplingParams(**fields)
    found = p_values(draw_often(shape, sampling, count), answer_probabilities(sampling))
    assert min(found.values()) > SIGNIFICANCE, found


@pytest.mark.parametrize("field", ["logit_bias", "top_k", "top_p", "min_p"])
def test_each_limit_has_its_say_after_some_tokens(field: str) -> None:
    """A check on the test above: one limit alone decides which tokens are cut off."""
    without = SamplingParams(**{name: value for name, value in BIASED_AND_CUT_OFF.items() if name != field})
    after = [(*PROMPT, *answer) for answer in itertools.product(range(VOCAB_SIZE), repeat=2)]
    sampling = SamplingParams(**BIASED_AND_CUT_OFF)
    assert any(next_probabilities(known, sampling) != next_probabilities(known, without) for known in after)


@pytest.mark.parametrize(
    ("shape", "count", "shift"),
    [
        (TREE, FEWER, 0.02),
        *(pytest.param(shape, NUM_OFTEN, 0.01, marks=pytest.mark.slow) for shape in (CHAIN, TREE)),
    ],
    ids=["tree, fewer", "chain", "tree"],
)
def test_a_walk_that_follows_a_few_wrong_guesses_is_found_out(
    monkeypatch: pytest.MonkeyPatch, shape: DraftShape, count: int, shift: float
) -> None:
    """So few that pairs of tokens shift by just that: the second token then comes from p + share * (q - p)."""
    p, q = (table[PROMPT[1]].softmax(-1) for table in (TARGET, GUESSER))  # [first, second]
    first = TARGET[PROMPT].softmax(-1)
    share = shift / float((first * (p - q).clamp(min=0.0).sum(-1)).sum())
    chance = random.Random(7)

    def wrong_now_and_then(tree: DraftTree, chosen: Sequence[int]) -> list[int]:
        return [0] if chance.random() < share else accepted_nodes(tree, chosen)  # the first is the best guess

    monkeypatch.setattr(runner, "accepted_nodes", wrong_now_and_then)
    found = p_values(draw_often(shape, SamplingParams(), count), answer_probabilities(SamplingParams()))
    assert found["first and second"] < SIGNIFICANCE, found
