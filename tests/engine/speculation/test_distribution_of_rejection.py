"""Tokens of 400,000 requests that are kept or drawn anew by the rule of rejection have the target's own distribution,
and what is one percent off is found out: chi-square tests. As in ``test_distribution_of_walks.py``, for any shift."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from token_tables import (
    GUESSER,
    NUM_NEW_TOKENS,
    PROMPT,
    SIGNIFICANCE,
    TARGET,
    VOCAB_SIZE,
    answer_probabilities,
    p_values,
    p_values_if_moved,
    summed,
)
from torch import Tensor

from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.speculation import rejection
from eagleray.engine.speculation.noise import ChoiceNoise
from eagleray.kernels.sampling.batch import RandomRows
from eagleray.kernels.sampling.noise import NO_TOKEN, gumbel_noise, row_keys, token_uniform

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_AT_ONCE = 400_000
ChooseAtOnce = Callable[[Tensor, RandomRows, Tensor, Tensor], Tensor]  # (target's logits, rows, drafts, guesses)


def draw_at_once(choose: ChooseAtOnce) -> Counter[tuple[int, ...]]:
    """As ``draw_answers`` with chains: whether a guess is the first of a step or follows one that came true, it is made
    after the same tokens and with the same noise."""
    seed = torch.randint(2**62, (NUM_AT_ONCE,), generator=torch.Generator().manual_seed(4))
    zero, temperature = torch.zeros_like(seed), torch.ones(NUM_AT_ONCE)
    known = [torch.full_like(seed, token) for token in PROMPT]
    for _ in range(NUM_NEW_TOKENS):
        position = torch.full_like(seed, len(known))
        target, draft = TARGET[known[-2], known[-1]], GUESSER[known[-2], known[-1]]
        noise = ChoiceNoise(temperature, temperature > 0, seed, zero, position)
        guesses = noise.perturb(draft[:, None], torch.arange(VOCAB_SIZE), depth=1)[:, 0].argmax(dim=-1)
        rows = RandomRows(torch.arange(NUM_AT_ONCE), temperature, seed, zero, position)
        known.append(choose(target, rows, draft, guesses))
    first, second, third = known[len(PROMPT) :]
    counts = ((first * VOCAB_SIZE + second) * VOCAB_SIZE + third).bincount(minlength=VOCAB_SIZE**3).tolist()
    return Counter(dict(zip(itertools.product(range(VOCAB_SIZE), repeat=NUM_NEW_TOKENS), counts, strict=True)))


def kept_or_drawn_anew(target: Tensor, rows: RandomRows, draft: Tensor, guesses: Tensor) -> Tensor:
    p, q = (logits.double().softmax(-1) for logits in (target, draft))
    return rejection.keep_or_draw_anew(p, q, guesses, *rejection._chance(rows, VOCAB_SIZE))


def test_many_answers_by_rejection_have_the_targets_own_distribution() -> None:
    found = p_values(draw_at_once(kept_or_drawn_anew), answer_probabilities(SamplingParams()))
    assert min(found.values()) > SIGNIFICANCE, found


def test_a_rejection_that_shifts_one_percent_by_keeping_a_few_wrong_guesses_is_found_out() -> None:
    """Of the first token alone, as if it were the only one: there the shift is one percent exactly. A share of the
    guesses counts whatever the rule says, so that tokens come from p + share * (q - p)."""
    p, q = (table[PROMPT].softmax(-1) for table in (TARGET, GUESSER))
    share = 0.01 / float((p - q).clamp(min=0.0).sum())
    chance = torch.Generator().manual_seed(5)

    def lenient(target: Tensor, rows: RandomRows, draft: Tensor, guesses: Tensor) -> Tensor:
        is_kept = torch.rand(NUM_AT_ONCE, generator=chance) < share
        return torch.where(is_kept, guesses, kept_or_drawn_anew(target, rows, draft, guesses))

    found = p_values(draw_at_once(lenient), answer_probabilities(SamplingParams()))
    assert found["first"] < SIGNIFICANCE and found["all"] < SIGNIFICANCE, found


def test_one_percent_moved_from_any_token_to_any_other_is_found_out() -> None:
    answers, expected = draw_at_once(kept_or_drawn_anew), answer_probabilities(SamplingParams())
    for place in range(NUM_NEW_TOKENS):
        counts, cells = (summed(each, lambda answer, at=place: (answer[at],)) for each in (answers, expected))
        assert max(p_values_if_moved(0.01, counts, cells)) < SIGNIFICANCE


# ---- rules that are wrong in one point each: the same statistics refuse them


def assert_rejection_is_found_out() -> None:
    found = p_values(draw_at_once(kept_or_drawn_anew), answer_probabilities(SamplingParams()))
    assert min(found.values()) < SIGNIFICANCE, found


def always_kept(target: Tensor, draft: Tensor, guessed: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
    return guessed


def drawn_anew_from_the_target(
    target: Tensor, draft: Tensor, guessed: Tensor, uniform: Tensor, noise: Tensor
) -> Tensor:
    p, q = (table.gather(1, guessed[:, None])[:, 0] for table in (target, draft))
    return torch.where(uniform * q < p, guessed, (target.log() + noise).argmax(dim=-1))


def drawn_anew_from_all_but_the_guess(
    target: Tensor, draft: Tensor, guessed: Tensor, uniform: Tensor, noise: Tensor
) -> Tensor:
    others = target * (1.0 - one_hot(guessed))
    return drawn_anew_from_the_target(target, draft, guessed, uniform, noise + others.log() - target.log())


def one_hot(token_ids: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(token_ids, VOCAB_SIZE).to(torch.float64)


@pytest.mark.parametrize(
    "wrong",
    [always_kept, drawn_anew_from_the_target, drawn_anew_from_all_but_the_guess],
)
def test_a_rejection_that_keeps_or_draws_wrongly_is_found_out(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(rejection, "keep_or_draw_anew", wrong)
    assert_rejection_is_found_out()


def guesses_noise_draws_anew(random: RandomRows, num_tokens: int) -> tuple[Tensor, Tensor]:
    keys = row_keys(random.seed, random.choice, ~random.position)
    return token_uniform(keys, NO_TOKEN), gumbel_noise(random.seed, random.choice, random.position, num_tokens)


def guesses_noise_keeps(random: RandomRows, num_tokens: int) -> tuple[Tensor, Tensor]:
    keys = row_keys(random.seed, random.choice, random.position)
    below_zero = gumbel_noise(random.seed, random.choice, ~random.position, num_tokens)
    return token_uniform(keys[:, None], torch.arange(num_tokens)).amax(dim=-1), below_zero


@pytest.mark.parametrize("wrong", [guesses_noise_draws_anew, guesses_noise_keeps])
def test_a_rejection_that_uses_the_noise_of_the_guess_again_is_found_out(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    monkeypatch.setattr(rejection, "_chance", wrong)
    assert_rejection_is_found_out()
