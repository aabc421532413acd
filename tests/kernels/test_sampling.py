from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eagleray.kernels.sampling.api import compute_logprobs, sample_tokens
from eagleray.kernels.sampling.batch import LogitBias, MinP, Penalties, RandomRows, SamplingBatch, TopKTopP
from eagleray.kernels.sampling.noise import gumbel_noise, uniform_from_bits
from eagleray.kernels.sampling.reference import apply_penalties, keep_min_p, keep_top_k_top_p

VOCAB = 40


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return 2.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def random_rows(num_rows: int, **fields: object) -> RandomRows:
    """Rows with temperature 1, seeds counting up, and whatever ``fields`` say."""
    defaults = {
        "rows": torch.arange(num_rows),
        "temperature": torch.ones(num_rows),
        "seed": torch.arange(num_rows),
        "choice": torch.zeros(num_rows, dtype=torch.int64),
        "position": torch.zeros(num_rows, dtype=torch.int64),
    }
    return RandomRows(**{**defaults, **fields})


def truncate_all(num_rows: int, top_k: int, top_p: float) -> TopKTopP:
    rows = torch.arange(num_rows)
    return TopKTopP(rows, torch.full_like(rows, top_k), torch.full((num_rows,), top_p, dtype=torch.float64), top_k)


def chi_square_is_plausible(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Whether counts fit: below the 99.99 % point, by the cube-root approximation (Wilson and Hilferty 1931)."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities[probabilities > 0] * counts.sum()
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    return statistic < degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


# ---- noise


def derived_gumbel(seed: int, choice: int, position: int, token: int) -> float:
    """The definition once more, in Python's integers."""
    mask, stride = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(value: int) -> int:
        value = ((value & mask) ^ ((value & mask) >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        return value ^ (value >> 31)

    key = mix(seed + stride)
    key = mix((key ^ (choice & mask)) + stride)
    key = mix(mix((key ^ (position & mask)) + stride) + stride)
    bits = mix(key + (token + 1) * stride)
    return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123])
def test_noise_is_the_documented_function_of_its_counters(seed: int):
    noise = gumbel_noise(integers(seed, seed), integers(0, 5), integers(7, 123456), 100)
    for row, (choice, position) in enumerate(((0, 7), (5, 123456))):
        expected = [derived_gumbel(seed, choice, position, token) for token in range(100)]
        np.testing.assert_allclose(noise[row].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_uniform_numbers_stay_strictly_between_zero_and_one():
    extremes = uniform_from_bits(integers(0, -1, 2**63 - 1, -(2**63)))
    assert ((extremes > 0) & (extremes < 1)).all()
    assert torch.isfinite(-(-extremes.log()).log()).all()


def counters(axis: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    fixed, running = torch.full((count,), 3), torch.arange(count)
    return tuple(running if axis == name else fixed for name in ("seed", "choice", "position"))


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_noise_is_gumbel_along_every_counter_and_every_token(axis: str):
    noise = gumbel_noise(*counters(axis, 512), 512).double().numpy()
    uniform = np.exp(-np.exp(-noise))
    even = np.full(32, 1 / 32)
    assert chi_square_is_plausible(np.histogram(uniform, bins=32, range=(0, 1))[0], even)
    for line in (uniform[0], uniform[-1], uniform[:, 0], uniform[:, -1]):
        assert chi_square_is_plausible(np.histogram(line, bins=32, range=(0, 1))[0], even)
    assert abs(noise.mean() - 0.57722) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.03


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_neighbouring_counters_and_tokens_are_uncorrelated(axis: str):
    noise = gumbel_noise(*counters(axis, 512), 512).double().numpy()
    centred = (noise - noise.mean()) / noise.std()
    for row_lag, token_lag in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 64), (64, 0)):
        shifted = centred[row_lag:, token_lag:]
        correlation = (centred[: shifted.shape[0], : shifted.shape[1]] * shifted).mean()
        assert abs(correlation) < 4.5 / 512, (row_lag, token_lag)


def test_joint_distribution_of_neighbours_is_even():
    uniform = np.exp(-np.exp(-gumbel_noise(*counters("position", 512), 512).double().numpy()))
    for first, second in ((uniform[:, :-1], uniform[:, 1:]), (uniform[:-1], uniform[1:])):
        cells = np.floor(first * 8).astype(int) * 8 + np.floor(second * 8).astype(int)
        assert chi_square_is_plausible(np.bincount(cells.ravel(), minlength=64), np.full(64, 1 / 64))


def test_seed_choice_and_position_are_not_interchangeable():
    values = [integers(0, 0, 1), integers(0, 1, 0), integers(1, 0, 0)]
    noise = gumbel_noise(*values, 8)
    assert not any(torch.equal(first, second) for first, second in pairwise(noise))


def test_noise_of_a_row_is_the_same_alone_and_in_any_batch():
    num_tokens = 3000
    seed, position = torch.arange(200) * 7919, torch.arange(200) * 31
    choice = torch.zeros_like(seed)
    together = gumbel_noise(seed, choice, position, num_tokens)  # several chunks
    for row in (0, 86, 87, 88, 199):
        alone = gumbel_noise(seed[row : row + 1], choice[:1], position[row : row + 1], num_tokens)
        assert torch.equal(alone[0], together[row])


# ---- distribution of what is drawn


def expected_probabilities(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """Truncated softmax, derived in the plain way."""
    probabilities = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-probabilities, kind="stable")
    probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    before = np.concatenate([[0.0], np.cumsum(probabilities[order])[:-1]])
    probabilities[order[before >= top_p]] = 0
    probabilities[probabilities < min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, VOCAB, 1.0, 0.0), (0.5, VOCAB, 1.0, 0.0), (1.7, VOCAB, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.0, VOCAB, 0.8, 0.0),
     (1.0, VOCAB, 1.0, 0.1), (0.7, 10, 0.9, 0.05)],
    ids=["plain", "cold", "hot", "top_k", "top_p", "min_p", "all"],
)  # fmt: skip
def test_drawn_tokens_follow_the_truncated_softmax(
    axis: str, temperature: float, top_k: int, top_p: float, min_p: float
):
    draws = 20_000
    logits = random_logits(1)
    seed, choice, position = counters(axis, draws)
    random = random_rows(
        draws,
        temperature=torch.full((draws,), temperature),
        seed=seed, choice=choice, position=position,
        top_k_top_p=truncate_all(draws, top_k, top_p) if top_k < VOCAB or top_p < 1 else None,
        min_p=MinP(torch.arange(draws), torch.full((draws,), min_p)) if min_p else None,
    )  # fmt: skip
    drawn = sample_tokens(logits.expand(draws, VOCAB), SamplingBatch(random=random))
    counts = np.bincount(drawn.numpy(), minlength=VOCAB)
    expected = expected_probabilities(logits[0].double().numpy(), temperature, top_k, top_p, min_p)
    assert chi_square_is_plausible(counts, expected)
    if temperature != 1.0:
        other = expected_probabilities(logits[0].double().numpy(), 1.0, VOCAB, 1.0, 0.0)
        assert not chi_square_is_plausible(counts, other)  # the test can tell


# ---- truncation


@pytest.mark.parametrize("top_k", [1, 2, 7, VOCAB])
def test_top_k_keeps_what_transformers_keeps(top_k: int):
    scores = random_logits(8)
    expected = TopKLogitsWarper(top_k)(None, scores)
    keep_top_k_top_p(scores, truncate_all(8, top_k, 1.0))
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
def test_top_p_keeps_what_transformers_keeps(top_p: float):
    scores = random_logits(8)
    expected = TopPLogitsWarper(top_p)(None, scores)
    keep_top_k_top_p(scores, truncate_all(8, VOCAB, top_p))
    assert torch.equal(scores, expected)


def test_top_p_applies_to_the_distribution_that_top_k_leaves():
    scores = random_logits(8)
    expected = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(6)(None, scores))
    keep_top_k_top_p(scores, truncate_all(8, 6, 0.7))
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p: float):
    scores = random_logits(8)
    expected = MinPLogitsWarper(min_p)(None, scores)
    keep_min_p(scores, MinP(torch.arange(8), torch.full((8,), min_p)))
    assert torch.equal(scores, expected)


def test_of_equal_scores_top_k_and_top_p_keep_the_lower_ids():
    equal = torch.zeros(2, VOCAB)
    rows, top_k, top_p = torch.arange(2), integers(3, VOCAB), torch.tensor([1.0, 0.125], dtype=torch.float64)
    keep_top_k_top_p(equal, TopKTopP(rows, top_k, top_p, VOCAB))
    assert [torch.isfinite(row).nonzero().flatten().tolist() for row in equal] == [[0, 1, 2], [0, 1, 2, 3, 4]]


def test_at_least_one_token_is_kept():
    scores = random_logits(4)
    best = scores.argmax(dim=-1)
    keep_top_k_top_p(scores, truncate_all(4, VOCAB, 1e-12))
    keep_min_p(scores, MinP(torch.arange(4), torch.ones(4)))
    assert torch.equal(scores.argmax(dim=-1), best)
    assert torch.isfinite(scores).sum(dim=-1).tolist() == [1, 1, 1, 1]


def test_truncation_of_a_row_does_not_depend_on_the_other_rows():
    scores = random_logits(3, vocab=500)
    together = scores.clone()
    top_k, top_p = integers(5, 500, 50), torch.tensor([0.9, 0.6, 1.0], dtype=torch.float64)
    keep_top_k_top_p(together, TopKTopP(torch.arange(3), top_k, top_p, 500))
    for row in range(3):
        alone = scores[row : row + 1].clone()
        one = slice(row, row + 1)
        keep_top_k_top_p(alone, TopKTopP(integers(0), top_k[one], top_p[one], int(top_k[row])))
        assert torch.equal(alone[0], together[row])


# ---- bias and penalties


def test_repetition_penalty_is_that_of_transformers():
    logits = random_logits(2)
    history = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(history, logits)
    penalties = Penalties(
        rows=integers(0, 1),
        repetition=torch.full((2,), 1.3),
        presence=torch.zeros(2),
        frequency=torch.zeros(2),
        history_rows=torch.arange(2).repeat_interleave(12),
        history_token_ids=history.flatten(),
        history_is_output=torch.arange(24) % 12 >= 6,
    )
    apply_penalties(logits, penalties)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_presence_and_frequency_count_the_output_alone():
    logits = random_logits(3)
    before = logits.clone()
    penalties = Penalties(
        rows=integers(2),
        repetition=torch.ones(1),
        presence=torch.tensor([0.5]),
        frequency=torch.tensor([0.25]),
        history_rows=integers(0, 0, 0, 0, 0),
        history_token_ids=integers(7, 8, 9, 9, 8),
        history_is_output=torch.tensor([False, False, True, True, True]),
    )
    apply_penalties(logits, penalties)
    expected = before.clone()
    expected[2, 9] -= 0.5 + 2 * 0.25
    expected[2, 8] -= 0.5 + 0.25
    torch.testing.assert_close(logits, expected)


def test_bias_decides_greedy_rows_and_minus_infinity_wins_over_it():
    logits = random_logits(2)
    before = logits.clone()
    best = logits.argmax(dim=-1)
    bias = LogitBias(
        rows=integers(0, 1, 1, 1),
        token_ids=torch.stack([integers(3)[0], integers(4)[0], integers(4)[0], best[1]]),
        values=torch.tensor([50.0, 50.0, -math.inf, -math.inf]),
    )
    second_best = logits[1].topk(2).indices[1]
    assert sample_tokens(logits, SamplingBatch(bias=bias)).tolist() == [3, int(second_best)]
    assert torch.equal(logits, before)


def test_bias_comes_before_penalties_and_these_before_temperature():
    draws = 20_000
    rows, zeros = torch.arange(draws), torch.zeros(draws, dtype=torch.int64)
    none = torch.zeros(draws)
    batch = SamplingBatch(
        bias=LogitBias(rows, zeros, torch.full((draws,), 1.0)),
        penalties=Penalties(rows, torch.full((draws,), 2.0), none, none, rows, zeros, zeros.bool()),
        random=random_rows(draws, temperature=torch.full((draws,), 0.5)),
    )
    drawn = sample_tokens(torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(draws, 4), batch)
    scores = np.array([(2.0 + 1.0) / 2.0, 1.0, 0.0, -1.0]) / 0.5
    probabilities = np.exp(scores) / np.exp(scores).sum()
    assert chi_square_is_plausible(np.bincount(drawn.numpy(), minlength=4), probabilities)


# ---- batches


def test_greedy_takes_the_lowest_id_of_equal_logits():
    logits = torch.zeros(2, VOCAB)
    logits[1, [11, 30]] = 1.0
    assert sample_tokens(logits, SamplingBatch()).tolist() == [0, 11]


def test_greedy_rows_stay_greedy_among_random_rows():
    logits = random_logits(4)
    random = random_rows(2, rows=integers(1, 3), temperature=torch.tensor([1.0, 50.0]))
    together = sample_tokens(logits, SamplingBatch(random=random))
    alone = sample_tokens(logits[[1, 3]], SamplingBatch(random=random_rows(2, temperature=random.temperature)))
    assert together[[0, 2]].tolist() == logits[[0, 2]].argmax(dim=-1).tolist()
    assert together[[1, 3]].tolist() == alone.tolist()


def test_a_row_with_everything_forbidden_gives_token_zero():
    forbid = LogitBias(torch.zeros(VOCAB, dtype=torch.int64), torch.arange(VOCAB), torch.full((VOCAB,), -math.inf))
    random = random_rows(
        1, top_k_top_p=truncate_all(1, 5, 0.5), min_p=MinP(integers(0), torch.tensor([0.5]))
    )  # fmt: skip
    assert sample_tokens(random_logits(1), SamplingBatch(bias=forbid, random=random)).tolist() == [0]


# ---- log-probabilities


def test_logprobs_ranks_and_alternatives_are_those_of_the_raw_logits():
    logits = random_logits(5)
    token_ids = integers(0, 7, 39, 3, 3)
    scored = compute_logprobs(logits, token_ids, 6)
    expected = torch.log_softmax(logits, dim=-1)
    torch.testing.assert_close(scored.logprob, expected.gather(1, token_ids[:, None])[:, 0])
    order = logits.argsort(dim=-1, descending=True)
    assert torch.equal(scored.top_ids, order[:, :6])
    torch.testing.assert_close(scored.top_logprobs, expected.gather(1, order[:, :6]))
    assert torch.equal(scored.rank, (order == token_ids[:, None]).int().argmax(dim=-1) + 1)


def test_alternatives_of_equal_logits_are_listed_by_token_id():
    logits = torch.zeros(1, VOCAB)
    logits[0, 0] = -0.0
    logits[0, [20, 9]] = 1.0
    logits[0, 2] = -3.0
    assert compute_logprobs(logits, integers(9), 5).top_ids.tolist() == [[9, 20, 0, 1, 3]]


def test_no_alternatives_are_an_empty_column():
    scored = compute_logprobs(random_logits(2), integers(1, 2), 0)
    assert scored.top_ids.shape == (2, 0)
