"""The next tokens of a hundred thousand requests, guessed and chosen by the functions that serve, have the target's own
distribution, and what is one percent off is found out: chi-square tests.

Power. One percent of n draws that come out as another token have noncentrality n * 0.0001 * (1 / p + 1 / p'), which is
at least 40 with 100,000, whatever the probabilities of the two; the critical value of 5 degrees of freedom is 20.5 at
0.1 %. That each such shift is found is asserted as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from token_tables import (
    EVERY_TOKEN,
    GUESSER,
    PROMPT,
    SIGNIFICANCE,
    SOME_TOKENS,
    TARGET,
    Answer,
    TableGuesser,
    answer_probabilities,
    next_probabilities,
    p_value,
    p_values_if_moved,
)
from torch import Tensor

from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.execution.sampler import Choice, Guess, TokenRule, build_sampling_batch, choose_tokens
from eagleray.engine.speculation import growth, rejection
from eagleray.engine.speculation.growth import draw_chains
from eagleray.engine.speculation.noise import ChoiceNoise
from eagleray.engine.speculation.rejection import choose_by_rejection
from eagleray.engine.speculation.tree import DraftShape, DraftTree, Proposal
from eagleray.kernels.sampling.api import sample_tokens
from eagleray.kernels.sampling.batch import RandomRows, SamplingBatch

NUM_REQUESTS, TEMPERATURE = 100_000, 1.2
BIAS = {1: 0.9, 5: -0.4}
RULES: dict[str, TokenRule] = {
    "target token": partial(choose_tokens, sample_tokens),
    "rejection": partial(choose_by_rejection, sample_tokens),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclasses.dataclass(frozen=True)
class Guesses:
    """One for each request, drawn from the best of some tokens."""

    target_ids_V: Tensor = EVERY_TOKEN
    num_candidates: int = 64

    def draw(self) -> list[DraftTree]:
        temperature_B, seed_B = torch.full((NUM_REQUESTS,), TEMPERATURE), seeds()
        position_B = torch.full_like(seed_B, len(PROMPT))
        noise = ChoiceNoise(temperature_B, temperature_B > 0, seed_B, torch.zeros_like(seed_B), position_B)
        guesser = TableGuesser(torch.tensor(PROMPT).expand(NUM_REQUESTS, -1), self.target_ids_V)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(growth, "_DRAWN_CANDIDATES", self.num_candidates)
            return draw_chains(guesser, DraftShape(1), noise)


GUESSES = {"of any token": Guesses(), "the best of some tokens": Guesses(SOME_TOKENS, num_candidates=3)}
ANY, SOME = GUESSES
LIMITS: dict[str, dict[str, Any]] = {
    "none": {},
    "bias, top k and top p": {"logit_bias": BIAS, "top_k": 5, "top_p": 0.82},
    "bias and min p": {"logit_bias": BIAS, "min_p": 0.2},
}


def seeds() -> Tensor:
    return torch.randint(2**62, (NUM_REQUESTS,), generator=torch.Generator().manual_seed(9))


def params_of(limits: str) -> SamplingParams:
    return SamplingParams(temperature=TEMPERATURE, **LIMITS[limits])


def choices_of(params: SamplingParams, drafts: Sequence[DraftTree]) -> list[Choice]:
    """Of the token after the prompt, each by a request with a seed of its own."""
    spec = RequestSpec(request_id="", token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=params)
    return [
        Choice(
            replace(spec, sampling=replace(params, seed=seed)),
            PROMPT,
            len(PROMPT),
            guess=Guess(draft.token_ids[0], draft.proposals[0]),
        )
        for seed, draft in zip(seeds().tolist(), drafts, strict=True)
    ]


def draw(rule: TokenRule, choices: Sequence[Choice]) -> Counter[Answer]:
    logits = TARGET[PROMPT].repeat(len(choices), 1)
    chosen = rule(logits, build_sampling_batch(choices, logits.shape[1], "cpu"), choices)
    return Counter({(token,): count for token, count in enumerate(chosen.bincount().tolist()) if count})


ChoicesOf = Callable[[str, str], Sequence[Choice]]  # under these limits, after such guesses


@pytest.fixture(scope="module")
def choices() -> ChoicesOf:
    """Both are made once."""
    drawn = cache(lambda guesses: GUESSES[guesses].draw())
    return cache(lambda limits, guesses: choices_of(params_of(limits), drawn(guesses)))


@pytest.mark.parametrize(
    ("rule", "limits", "guesses"),
    [
        ("rejection", "none", ANY),
        ("rejection", "none", SOME),
        *((rule, limits, ANY) for rule in RULES for limits in LIMITS if limits != "none"),
    ],
)
def test_next_tokens_have_the_targets_own_distribution_and_one_percent_elsewhere_would_show(
    choices: ChoicesOf, rule: str, limits: str, guesses: str
) -> None:
    counts = draw(RULES[rule], choices(limits, guesses))
    expected = answer_probabilities(params_of(limits), num_tokens=1)
    assert p_value(counts, expected) > SIGNIFICANCE
    assert max(p_values_if_moved(0.01, counts, expected)) < SIGNIFICANCE


@pytest.mark.parametrize(
    ("limits", "field"), [(limits, field) for limits, fields in LIMITS.items() for field in fields]
)
def test_each_limit_has_its_say(limits: str, field: str) -> None:
    """A check on the test above: there are tokens that this one alone cuts off, or a bias that moves some."""
    without = {name: value for name, value in LIMITS[limits].items() if name != field}
    found = next_probabilities(PROMPT, SamplingParams(temperature=TEMPERATURE, **without))
    assert found != next_probabilities(PROMPT, params_of(limits))


def test_guesses_of_a_part_of_the_vocabulary_are_drawn_from_its_best_as_they_say(choices: ChoicesOf) -> None:
    """The target's favourite, which the guesser does not know, is not among them, nor is the worst that it knows."""
    guesses = [choice.guess for choice in choices("none", SOME) if choice.guess is not None]
    [said] = {guess.proposal for guess in guesses}
    best = sorted(SOME_TOKENS.tolist(), key=lambda token: -GUESSER[PROMPT][token])[: GUESSES[SOME].num_candidates]
    weights = [math.exp(GUESSER[PROMPT][token] / TEMPERATURE) for token in best]
    assert said is not None and said.token_ids == (*best,)
    assert said.probabilities == pytest.approx([weight / sum(weights) for weight in weights])
    drawn = Counter((guess.token_id,) for guess in guesses)
    expected = {(token,): q for token, q in zip(said.token_ids, said.probabilities, strict=True)}
    assert p_value(drawn, expected) > SIGNIFICANCE
    assert max(p_values_if_moved(0.01, drawn, expected)) < SIGNIFICANCE


# ---- rules that are wrong in one point each


def kept_below_p(target: Tensor, draft: Tensor, guessed: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
    """However likely the guess was."""
    more = (target - draft).clamp(min=0.0)
    return torch.where(uniform < of_guesses(target, guessed), guessed, (more.log() + noise).argmax(dim=-1))


def drawn_anew_from_p(target: Tensor, draft: Tensor, guessed: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
    """Not from what it has more of than q."""
    is_kept = uniform * of_guesses(draft, guessed) < of_guesses(target, guessed)
    return torch.where(is_kept, guessed, (target.log() + noise).argmax(dim=-1))


def kept_a_little_too_often(target: Tensor, draft: Tensor, guessed: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
    """So little that one percent of the tokens comes out as another: they come from p + share * (q - p)."""
    share = 0.01 / (target - draft).clamp(min=0.0).sum(dim=-1)
    is_kept = torch.rand(len(guessed), generator=torch.Generator().manual_seed(5)) < share
    return torch.where(is_kept, guessed, keep_or_draw_anew(target, draft, guessed, uniform, noise))


def of_guesses(probabilities: Tensor, guessed: Tensor) -> Tensor:
    return probabilities.gather(1, guessed[:, None])[:, 0]


keep_or_draw_anew, as_tensors = rejection.keep_or_draw_anew, rejection._as_tensors


def without_limits(logits: Tensor, random: RandomRows) -> Tensor:
    return logits[random.rows] / random.temperature[:, None]


def without_bias(logits: Tensor, batch: SamplingBatch) -> Tensor:
    return logits


def without_temperature(guesses: Sequence[Guess], like: Tensor) -> tuple[Tensor, Tensor]:
    """Of what guesses were drawn from."""
    draft, guessed = as_tensors(guesses, like)
    return draft**TEMPERATURE / (draft**TEMPERATURE).sum(dim=-1, keepdim=True), guessed


@pytest.mark.parametrize(
    ("part", "wrong", "limits"),
    [
        ("keep_or_draw_anew", kept_below_p, "none"),
        ("keep_or_draw_anew", drawn_anew_from_p, "none"),
        ("keep_or_draw_anew", kept_a_little_too_often, "none"),
        ("_as_tensors", without_temperature, "none"),
        ("truncated_scores", without_limits, "bias and min p"),
        ("adjust", without_bias, "bias and min p"),
    ],
)
def test_a_rejection_that_is_wrong_in_one_point_is_found_out(
    choices: ChoicesOf, monkeypatch: pytest.MonkeyPatch, part: str, wrong: Callable[..., Any], limits: str
) -> None:
    monkeypatch.setattr(rejection, part, wrong)
    counts = draw(RULES["rejection"], choices(limits, ANY))
    assert p_value(counts, answer_probabilities(params_of(limits), num_tokens=1)) < SIGNIFICANCE


def test_a_draft_whose_probabilities_are_those_among_all_tokens_that_it_knows_is_found_out(choices: ChoicesOf) -> None:
    """Not among those that it was drawn from."""
    logits = TableGuesser(torch.tensor([PROMPT]), SOME_TOKENS).root_logits()[0] / TEMPERATURE
    share = float(logits.softmax(-1).topk(GUESSES[SOME].num_candidates).values.sum())

    def wrong(choice: Choice) -> Choice:
        assert choice.guess is not None and choice.guess.proposal is not None
        tokens, probabilities = choice.guess.proposal.token_ids, choice.guess.proposal.probabilities
        proposal = Proposal(tokens, tuple(share * q for q in probabilities))
        return dataclasses.replace(choice, guess=Guess(choice.guess.token_id, proposal))

    counts = draw(RULES["rejection"], [wrong(choice) for choice in choices("none", SOME)])
    assert p_value(counts, answer_probabilities(params_of("none"), num_tokens=1)) < SIGNIFICANCE
