"""Choosing the next token: a pure function of a row's logits, parameters, history and counters.

Order: bias (which also forbids), penalties, temperature, top-k, top-p, min-p, Gumbel noise, argmax. Log-probabilities
are taken from the raw logits, before any of it.
"""

from __future__ import annotations

from torch import Tensor

from eagleray.kernels.sampling.batch import Logprobs, SamplingBatch, SharedNoise
from eagleray.kernels.sampling.reference import adjust, guess, ranking_keys, sample_random


def sample_tokens(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The next token of each row.

    Args:
        logits: float32 [R, V]; left as they are.
        batch: what the rows ask for, on the same device.

    Returns:
        int64 [R]. Among equal scores the lowest token id. A row with every token forbidden gives token 0.
    """
    logits = adjust(logits, batch)
    random = batch.random
    if random is not None and len(random.rows) == len(logits):
        return sample_random(logits, random)
    token_ids = logits.argmax(dim=-1)
    if random is not None:
        token_ids[random.rows] = sample_random(logits, random)
    return token_ids


def guess_tokens(logits: Tensor, noise: SharedNoise, token_ids: Tensor | None) -> Tensor:
    """What a target would choose whose logits were these: the best token, or the best with the target's own noise.

    Args:
        logits: float32 [R, V].
        noise: of the target, which truncates nothing.
        token_ids: int64 [V], the target's for each of V; None: the same.

    Returns:
        int64 [R], ids of the target's. (Drafter-invariant speculation: Daliri, Musco, Suresh, arXiv 2408.07978.)
    """
    return guess(logits, noise, token_ids)


def compute_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """Log-probabilities of ``token_ids`` (int64 [R]) and of the ``num_top`` best tokens under raw ``logits``
    (float32 [R, V])."""
    log_normaliser = logits.logsumexp(dim=-1, keepdim=True)  # [R, 1]
    chosen = logits.gather(1, token_ids[:, None])
    top_ids = ranking_keys(logits).topk(min(num_top, logits.shape[1]), dim=-1).indices
    return Logprobs(
        logprob=(chosen - log_normaliser)[:, 0],
        rank=1 + (logits > chosen).sum(dim=-1),
        top_ids=top_ids,
        top_logprobs=logits.gather(1, top_ids) - log_normaliser,
    )
