"""The native sampler equals the torch twin, token for token: the noise is the same function in both."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eagleray.kernels.native.library import NativeLibrary
from eagleray.kernels.sampling import api, native
from eagleray.kernels.sampling.batch import LogitBias, MinP, RandomRows, SamplingBatch, SharedNoise, TopKTopP
from eagleray.kernels.sampling.reference import weights_of

INFINITY = math.inf


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(num_rows: int, seed: int = 0, **fields: object) -> RandomRows:
    """Any seeds, small choices and positions, temperatures from cold to hot."""
    source = generator(seed)
    defaults = {
        "rows": torch.arange(num_rows),
        "temperature": torch.rand(num_rows, generator=source) * 2 + 0.05,
        "seed": torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=source),
        "choice": torch.randint(0, 4, (num_rows,), generator=source),
        "position": torch.randint(0, 100_000, (num_rows,), generator=source),
    }
    return RandomRows(**{**defaults, **fields})


def assert_same(library: NativeLibrary, logits: Tensor, batch: SamplingBatch) -> Tensor:
    expected = api.sample_tokens(logits, batch)
    assert native.sample_tokens(library, logits, batch).tolist() == expected.tolist()
    return expected


@pytest.mark.parametrize("vocab", [1, 2, 15, 255, 256, 257, 1000, 4096, 32_001])
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
def test_random_rows_draw_what_the_reference_draws(library: NativeLibrary, vocab: int, scale: float) -> None:
    rows = max(4, min(100, 50_000 // vocab))
    logits = torch.randn(rows, vocab, generator=generator(vocab)) * scale
    assert_same(library, logits, SamplingBatch(random=random_rows(rows, vocab)))


@pytest.mark.parametrize("vocab", [1, 15, 257, 32_001])
def test_greedy_rows_take_what_the_reference_takes(library: NativeLibrary, vocab: int) -> None:
    assert_same(library, torch.randn(20, vocab, generator=generator(vocab)), SamplingBatch())
    assert_same(library, torch.randint(0, 3, (20, vocab), generator=generator(vocab)).float(), SamplingBatch())


def test_rising_and_falling_rows_draw_what_the_reference_draws(library: NativeLibrary) -> None:
    slopes = torch.tensor([1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])[:, None]
    rising = slopes * torch.arange(3000)
    logits = torch.cat((rising, rising.flip(1)))
    assert_same(library, logits, SamplingBatch(random=random_rows(len(logits))))
    assert_same(library, logits, SamplingBatch())


@pytest.mark.parametrize("position", [0, 100, 511])
def test_extreme_and_forbidden_logits_draw_what_the_reference_draws(library: NativeLibrary, position: int) -> None:
    logits = torch.randn(9, 512, generator=generator(1))
    logits[0] = -INFINITY
    logits[1] = -INFINITY
    logits[1, position] = -3.0
    logits[2, position] = INFINITY
    logits[3, [position, 300]] = INFINITY
    logits[4] = 3e38 * logits[4].sign()  # differences overflow
    logits[5, ::2] = -INFINITY
    logits[6] = -0.0
    logits[6, ::3] = 0.0
    logits[7, position] = 1e30
    logits[8] *= 1e-40  # denormal
    for temperature in (1e-3, 1.0, 100.0):
        random = random_rows(9, temperature=torch.full((9,), temperature))
        assert_same(library, logits, SamplingBatch(random=random))
    assert_same(library, logits, SamplingBatch())


def test_of_equal_scores_the_lowest_token_is_drawn(library: NativeLibrary) -> None:
    """At 3e7 a float's neighbours are 2 apart: the noise is lost in the rounding, and all scores are equal."""
    logits = torch.full((50, 700), -3e7)
    logits[:, 650] = 0.0
    logits[:, 650] = -3e7 + 2.0
    random = random_rows(50, temperature=torch.full((50,), 1e-7))
    assert_same(library, logits, SamplingBatch(random=random))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_greedy_and_random_rows_mix_and_views_of_logits_will_do(load, num_threads: int) -> None:
    library = load(num_threads=num_threads)
    logits = torch.randn(40, 2 * 5000, generator=generator(3))[::2, :5000]
    random = random_rows(7, rows=torch.tensor([0, 3, 4, 9, 11, 18, 19]))
    assert_same(library, logits, SamplingBatch(random=random))
    assert_same(library, logits.T.contiguous().T, SamplingBatch(random=random))


def test_bias_is_added_to_a_copy(library: NativeLibrary) -> None:
    logits = torch.randn(3, 300, generator=generator(4))
    before = logits.clone()
    bias = LogitBias(torch.tensor([0, 2]), torch.tensor([7, 8]), torch.tensor([100.0, 100.0]))
    assert assert_same(library, logits, SamplingBatch(bias=bias)).tolist()[::2] == [7, 8]
    assert torch.equal(logits, before)


def test_no_rows_give_no_tokens(library: NativeLibrary) -> None:
    assert native.sample_tokens(library, torch.empty(0, 50), SamplingBatch()).tolist() == []


def test_a_row_that_does_not_exist_is_refused(library: NativeLibrary) -> None:
    with pytest.raises(IndexError, match="not all within the 2 rows"):
        native.sample_random(library, torch.zeros(2, 50), random_rows(1, rows=torch.tensor([2])))


TRUNCATIONS = {"top_k": (40, 1.0, 0.0), "top_1": (1, 1.0, 0.0), "top_p": (0, 0.9, 0.0), "little": (0, 1e-9, 0.0),
               "nearly_all": (0, 0.9999999, 0.0), "both": (100, 0.7, 0.0), "min_p": (0, 1.0, 0.05),
               "all": (200, 0.95, 0.02)}  # fmt: skip


def truncated(which: Tensor, vocab: int, name: str, **fields: object) -> RandomRows:
    top_k, top_p, min_p = TRUNCATIONS[name]
    count = len(which)
    top_k = min(top_k, vocab) or vocab
    truncation = TopKTopP(which, torch.full((count,), top_k), torch.full((count,), top_p, dtype=torch.float64), top_k)
    return random_rows(
        fields.pop("num_rows", count),
        top_k_top_p=truncation if top_k < vocab or top_p < 1 else None,
        min_p=MinP(which, torch.full((count,), min_p)) if min_p else None,
        **fields,
    )


@pytest.mark.parametrize("name", TRUNCATIONS)
@pytest.mark.parametrize("vocab", [30, 257, 5000])
def test_truncated_rows_draw_what_the_reference_draws(library: NativeLibrary, name: str, vocab: int) -> None:
    logits = torch.randn(60, vocab, generator=generator(vocab)) * 3
    logits[:20] = torch.randint(-3, 3, (20, vocab), generator=generator(vocab)).float()  # many are equal
    logits[20, ::2] = -INFINITY
    logits[21] = -INFINITY
    logits[22] = 0.0
    assert_same(library, logits, SamplingBatch(random=truncated(torch.arange(60), vocab, name)))


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_rows_without_truncation_mix_with_those_that_have_it(library: NativeLibrary, name: str) -> None:
    logits = torch.randn(30, 1000, generator=generator(5)) * 3
    random = truncated(torch.tensor([1, 4, 5]), 1000, name, num_rows=8, rows=torch.arange(10, 18))
    assert_same(library, logits, SamplingBatch(random=random))


def test_a_share_that_ends_exactly_between_two_tokens_is_cut_where_the_reference_cuts(library: NativeLibrary) -> None:
    """A weight that differs in one unit of 2^-40 would move the cut, and the tokens beside it are drawn often."""
    draws_each = 12
    for seed in range(12):
        logits = torch.rand(8, generator=generator(seed)).sort(descending=True).values * 3
        weights = weights_of(logits - logits[0])
        ends = weights.cumsum(0)[:-1].double() / weights.sum().double()
        shares = torch.cat((ends, ends * (1 + 2.0**-42))).repeat_interleave(
            draws_each
        )  # before and after the cut moves
        rows = torch.arange(len(shares))
        random = random_rows(
            len(shares),
            seed,
            temperature=torch.ones(len(shares)),
            top_k_top_p=TopKTopP(rows, torch.full((len(shares),), 8), shares, 8),
        )
        assert_same(library, logits.expand(len(shares), 8).contiguous(), SamplingBatch(random=random))


@pytest.mark.parametrize("vocab", [1, 257, 4000])
@pytest.mark.parametrize("has_ids", [False, True])
def test_guesses_are_those_of_the_reference(library: NativeLibrary, vocab: int, has_ids: bool) -> None:
    logits = torch.randn(40, vocab, generator=generator(vocab)) * 3
    token_ids = torch.randperm(2 * vocab, generator=generator(1))[:vocab].sort().values if has_ids else None
    rows = random_rows(40, vocab)
    temperature = rows.temperature * (torch.arange(40) % 3 > 0)  # each third row is greedy
    noise = SharedNoise(temperature, rows.seed, rows.choice, rows.position)
    expected = api.guess_tokens(logits, noise, token_ids)
    assert native.guess_tokens(library, logits, noise, token_ids).tolist() == expected.tolist()


def test_a_guess_from_the_targets_logits_is_the_targets_choice(library: NativeLibrary) -> None:
    logits, rows = torch.randn(50, 900, generator=generator(2)), random_rows(50)
    noise = SharedNoise(rows.temperature, rows.seed, rows.choice, rows.position)
    chosen = native.sample_tokens(library, logits, SamplingBatch(random=rows)).tolist()
    assert native.guess_tokens(library, logits, noise, None).tolist() == chosen
    shuffled = torch.randperm(900, generator=generator(3))  # a vocabulary of the guesser's own, in another order
    assert native.guess_tokens(library, logits[:, shuffled].contiguous(), noise, shuffled).tolist() == chosen
