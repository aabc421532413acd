"""The steps of sampling in plain torch: each takes logits [rows, vocabulary] and is a function of its row alone."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from eagleray.kernels.sampling.batch import LogitBias, MinP, Penalties, RandomRows, SamplingBatch, SharedNoise, TopKTopP
from eagleray.kernels.sampling.noise import gumbel_noise, row_keys, token_noise

_FORBIDDEN: Final = float("-inf")
_LEAST_SCORE: Final = -28.0  # e^-28 < 2^-40
_LOG2_E: Final = 6196328019  # times 2^32
_POWER_SERIES: Final = tuple(round(2**31.5 * (-math.log(2)) ** n / math.factorial(n)) for n in range(8))


def adjust(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """``logits`` with bias and penalties: themselves if there are none, else a copy."""
    if batch.bias is not None or batch.penalties is not None:
        logits = logits.clone()
    if batch.bias is not None:
        add_bias(logits, batch.bias)
    if batch.penalties is not None:
        apply_penalties(logits, batch.penalties)
    return logits


def add_bias(logits: Tensor, bias: LogitBias) -> None:
    """Add in place. Of several values for one token all count; minus infinity wins whatever the order."""
    logits.index_put_((bias.rows, bias.token_ids), bias.values, accumulate=True)


def apply_penalties(logits: Tensor, penalties: Penalties) -> None:
    """Penalise in place: repetition (Keskar et al., arXiv 1909.05858) scales a logit towards less likely,
    frequency and presence (OpenAI's API) subtract per occurrence and once."""
    counts = torch.zeros(2, len(penalties.rows), logits.shape[1], dtype=torch.float32, device=logits.device)
    where = (penalties.history_is_output.to(torch.int64), penalties.history_rows, penalties.history_token_ids)
    counts.index_put_(where, torch.ones_like(penalties.history_rows, dtype=torch.float32), accumulate=True)
    in_prompt, in_output = counts  # [P, V] each
    scores = logits[penalties.rows]
    repetition = penalties.repetition[:, None]
    penalised = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(in_prompt + in_output > 0, penalised, scores)
    scores -= penalties.frequency[:, None] * in_output
    scores -= penalties.presence[:, None] * (in_output > 0)
    logits[penalties.rows] = scores


def sample_random(logits: Tensor, random: RandomRows) -> Tensor:
    """Next tokens int64 [S] of the rows with a temperature: exact draws from the truncated distribution, because
    ``argmax(log p + gumbel)`` has distribution p (the Gumbel-max trick)."""
    scores = truncated_scores(logits, random)
    scores += gumbel_noise(random.seed, random.choice, random.position, scores.shape[1])
    return scores.argmax(dim=-1)


def guess(logits: Tensor, noise: SharedNoise, token_ids: Tensor | None) -> Tensor:
    """See ``api.guess_tokens``."""
    ids = torch.arange(logits.shape[1], device=logits.device) if token_ids is None else token_ids
    temperature = noise.temperature[:, None]
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / torch.where(temperature > 0, temperature, 1.0)
    keys = row_keys(noise.seed, noise.choice, noise.position)
    scores += torch.where(temperature > 0, token_noise(keys[:, None], ids), 0.0)
    return ids[scores.argmax(dim=-1)]


def truncated_scores(logits: Tensor, random: RandomRows) -> Tensor:
    """float32 [S, V]: logarithms of probabilities up to a constant, the largest 0, and minus infinity where a token is
    cut off."""
    scores = logits[random.rows]
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / random.temperature[:, None]  # at most 0: cannot overflow
    if random.top_k_top_p is not None:
        keep_top_k_top_p(scores, random.top_k_top_p)
    if random.min_p is not None:
        keep_min_p(scores, random.min_p)
    return scores


def keep_top_k_top_p(scores: Tensor, truncation: TopKTopP) -> None:
    """Forbid in place all but the ``top_k`` best tokens, and of these all but the fewest whose probabilities, among
    the ``top_k``, sum up to ``top_p`` (Holtzman et al., arXiv 1904.09751). Of equal tokens the lower ids stay."""
    chosen = scores[truncation.rows]
    token_ids = ranking_keys(chosen).topk(truncation.max_top_k, dim=-1).indices  # [K, max_top_k], best first
    within_top_k = torch.arange(truncation.max_top_k, device=scores.device) < truncation.top_k[:, None]
    best = chosen.gather(1, token_ids)
    weights = torch.where(within_top_k, weights_of(best - best[:, :1]), 0)
    cumulative = weights.cumsum(dim=-1)
    top_p = truncation.top_p[:, None]
    wanted = top_p * cumulative[:, -1:].to(torch.float64)
    within_top_p = ((cumulative - weights).to(torch.float64) < wanted) | (top_p >= 1.0)
    kept = torch.zeros_like(chosen, dtype=torch.bool).scatter_(1, token_ids, within_top_k & within_top_p)
    scores[truncation.rows] = chosen.masked_fill_(~kept, _FORBIDDEN)


def weights_of(scores: Tensor) -> Tensor:
    """int64, about 2^40 e^score for float32 ``scores``, at most 0; what is below 1 is 0.

    By integers, whose sums are the same in whatever order, width and place they are added up: x = -score log2(e) is
    n + f, and the power 2^-f a Taylor polynomial in f - 1/2, to five parts in 10^9.
    """
    x = (scores.clamp(min=_LEAST_SCORE) * -(2.0**24)).to(torch.int64) * _LOG2_E  # with 56 bits of fraction
    fraction = ((x >> 26) & (2**30 - 1)) - 2**29  # 30 bits
    power = torch.full_like(x, _POWER_SERIES[-1])  # 32 bits
    for coefficient in reversed(_POWER_SERIES[:-1]):
        power = ((power * fraction) >> 30) + coefficient
    return (power << 8) >> (x >> 56)


def keep_min_p(scores: Tensor, truncation: MinP) -> None:
    """Forbid in place tokens less likely than ``min_p`` times the likeliest (Nguyen et al., arXiv 2407.01082)."""
    chosen = scores[truncation.rows]
    threshold = chosen.amax(dim=-1) + truncation.min_p.log()
    scores[truncation.rows] = chosen.masked_fill_(chosen < threshold[:, None], _FORBIDDEN)


def ranking_keys(logits: Tensor) -> Tensor:
    """int64 keys that order each row by logit, then by lower token id: no two are equal, so that what a selection
    returns does not depend on how it breaks ties. ``logits`` are float32 [R, V] without NaN."""
    bits = (logits + 0.0).view(torch.int32)  # adding zero joins -0.0 and 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # for negative numbers, a larger magnitude is a smaller integer
    token_ids = torch.arange(logits.shape[1], dtype=torch.int64, device=logits.device)
    return (ordered.to(torch.int64) << 32) | (0xFFFFFFFF - token_ids)
