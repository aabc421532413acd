"""The classic rule of verification, for chains: a guess that was drawn from q comes true with probability p / q.

Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318. At each node, with p the target's distribution and x
the guess, drawn from q:

    keep x with probability min(1, p(x) / q(x)), else draw from what p has more of than q: max(0, p - q), normalised

What comes out has distribution p, as the target's own token has, and is the guess as often as two draws can be equal.
Seen from the walk it is another way to choose the token after a node, so ``verify.accepted_nodes`` serves both rules.
A guess without chance in it has q = 1. Where nothing is guessed, and for greedy requests, the token is the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from eagleray.engine.execution.sampler import Choice, Guess, SampleTokens, build_sampling_batch
from eagleray.engine.speculation.tree import Proposal
from eagleray.kernels.sampling.batch import RandomRows, SamplingBatch
from eagleray.kernels.sampling.noise import NO_TOKEN, gumbel_noise, row_keys, token_uniform
from eagleray.kernels.sampling.reference import adjust, truncated_scores


def choose_by_rejection(
    sample: SampleTokens, logits: Tensor, sampling: SamplingBatch, choices: Sequence[Choice]
) -> Tensor:
    """Next tokens int64 [R] for ``logits`` [R, V]. Bias, penalties, temperature and truncation make up p."""
    token_ids = sample(logits, sampling)
    guesses = {
        row: choice.guess
        for row, choice in enumerate(choices)
        if choice.guess is not None and not choice.spec.sampling.is_greedy
    }
    if not guesses:
        return token_ids
    rows = torch.tensor(list(guesses), device=logits.device)
    batch = build_sampling_batch([choices[row] for row in guesses], logits.shape[1], str(logits.device))
    assert batch.random is not None
    target = truncated_scores(adjust(logits[rows], batch), batch.random).to(torch.float64).softmax(dim=-1)
    draft, guessed = _as_tensors(list(guesses.values()), target)
    token_ids[rows] = keep_or_draw_anew(target, draft, guessed, *_chance(batch.random, logits.shape[1]))
    return token_ids


def keep_or_draw_anew(target: Tensor, draft: Tensor, guessed: Tensor, uniform: Tensor, noise: Tensor) -> Tensor:
    """int64 [R]: distributed as ``target``, if ``guessed`` is distributed as ``draft``.

    Args:
        target, draft: probabilities float64 [R, V].
        guessed: int64 [R].
        uniform: [R], between 0 and 1.
        noise: standard Gumbel noise [R, V]; both independent of how ``guessed`` was drawn, and of each other.
    """
    p, q = (probabilities.gather(1, guessed[:, None])[:, 0] for probabilities in (target, draft))
    more = (target - draft).clamp(min=0.0)
    is_kept = (uniform * q < p) | (more.sum(dim=-1) == 0.0)  # p and q are the same, up to rounding
    return torch.where(is_kept, guessed, (more.log() + noise).argmax(dim=-1))


def _as_tensors(guesses: Sequence[Guess], like: Tensor) -> tuple[Tensor, Tensor]:
    """(probabilities of the drafts, as ``like``, guessed tokens)."""
    proposals = [guess.proposal or Proposal((guess.token_id,), (1.0,)) for guess in guesses]
    rows = [row for row, proposal in enumerate(proposals) for _ in proposal.token_ids]
    token_ids = list(chain.from_iterable(proposal.token_ids for proposal in proposals))
    probabilities = list(chain.from_iterable(proposal.probabilities for proposal in proposals))
    draft = torch.zeros_like(like)
    draft[torch.tensor(rows), torch.tensor(token_ids)] = like.new_tensor(probabilities)
    return draft, torch.tensor([guess.token_id for guess in guesses], device=like.device)


def _chance(random: RandomRows, num_tokens: int) -> tuple[Tensor, Tensor]:
    """(uniform [R], Gumbel noise [R, V]). The noise of a position has served to draw the guess; that of positions below
    zero is nobody's."""
    below_zero = ~random.position
    keys = row_keys(random.seed, random.choice, below_zero)
    return token_uniform(keys, NO_TOKEN), gumbel_noise(random.seed, random.choice, below_zero, num_tokens)
