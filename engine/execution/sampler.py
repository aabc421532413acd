"""What a step has to choose: rows of parameters become tensors, tensors become results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from eagleray.core.messages import TokenLogprobs
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.scheduling.plan import ScheduledRun
from eagleray.engine.speculation.tree import DraftTree, Proposal
from eagleray.kernels.replay.api import StepIntegers
from eagleray.kernels.sampling.api import compute_logprobs
from eagleray.kernels.sampling.batch import LogitBias, MinP, Penalties, RandomRows, SamplingBatch, TopKTopP

SampleTokens = Callable[[Tensor, SamplingBatch], Tensor]  # ``kernels/sampling/api.sample_tokens``
# Next tokens int64 [R] from logits [R, V], by what is asked of the sampler for these choices. Where that is the best
# token of each row, every rule takes it, and may not be asked.
TokenRule = Callable[[Tensor, SamplingBatch, Sequence["Choice"]], Tensor]

_FORBIDDEN: Final = float("-inf")
_FORBIDDING_BIAS: Final = -100.0  # OpenAI: "values like -100 or 100 should result in a ban or exclusive selection"


@dataclass(frozen=True, slots=True)
class Guess:
    """A guess of one token."""

    token_id: int
    proposal: Proposal | None  # that it was drawn from; none: there was no chance in it


@dataclass(frozen=True, slots=True)
class Choice:
    """A next token to choose: after the last known token of a run that samples, or after guesses that follow it."""

    spec: RequestSpec
    known_token_ids: Sequence[int]  # may go on after the last that counts
    num_known: int
    guessed: tuple[int, ...] = ()
    guess: Guess | None = None  # of this very token

    @property
    def position(self) -> int:
        """Index in the request of the token to choose."""
        return self.num_known + len(self.guessed)

    @property
    def history(self) -> list[int]:
        """All tokens before it."""
        return [*self.known_token_ids[: self.num_known], *self.guessed]


def choices_of(run: ScheduledRun) -> list[Choice]:
    """After the last known token of a run that samples, then after each of its guesses."""
    tree = run.draft
    if tree is None:
        return [Choice(run.spec, run.known_token_ids, run.end)]
    if tree.is_chain:
        paths = [tree.token_ids[:depth] for depth in range(len(tree) + 1)]
        guesses = _guesses(tree)
    else:
        paths = [(), *(tuple(tree.token_ids[step] for step in tree.path(node)) for node in range(len(tree)))]
        guesses = [None] * len(paths)
    return [
        Choice(run.spec, run.known_token_ids, run.end, path, guess) for path, guess in zip(paths, guesses, strict=True)
    ]


def _guesses(chain: DraftTree) -> list[Guess | None]:
    """Of the token after the root, then after each node; nothing is guessed after the last."""
    proposals = chain.proposals or [None] * len(chain)
    return [*map(Guess, chain.token_ids, proposals), None]


def choose_tokens(sample: SampleTokens, logits: Tensor, sampling: SamplingBatch, choices: Sequence[Choice]) -> Tensor:
    """The rule of the target's own token: int64 [R] for ``logits`` [R, V], whatever was guessed."""
    return sample(logits, sampling)


def score_tokens(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of ``token_ids`` [R] under raw ``logits`` [R, V], with ``num_top[r]`` alternatives each."""
    scored = compute_logprobs(logits, token_ids, max(num_top))
    columns = (token_ids, scored.logprob, scored.rank, scored.top_ids, scored.top_logprobs)
    rows = zip(*(column.tolist() for column in columns), num_top, strict=True)
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(top_ids[:count]), tuple(top_logprobs[:count]))
        for token_id, logprob, rank, top_ids, top_logprobs, count in rows
    ]


def build_sampling_batch(choices: Sequence[Choice], vocab_size: int, device: str) -> SamplingBatch:
    """The parameters and histories of ``choices``, one row each, as tensors on ``device``."""
    if all(map(_asks_for_nothing, {id(choice.spec): choice.spec for choice in choices}.values())):
        return SamplingBatch()
    return SamplingBatch(
        bias=_build_bias(choices, vocab_size, device),
        penalties=_build_penalties(choices, vocab_size, device),
        random=_build_random(choices, vocab_size, device),
    )


def _asks_for_nothing(spec: RequestSpec) -> bool:
    """Greedy, from the logits as they are: so is nearly every step, and rows need not be asked one by one."""
    sampling = spec.sampling
    return sampling.is_greedy and not (sampling.logit_bias or sampling.min_tokens or _has_penalties(sampling))


def _build_bias(choices: Sequence[Choice], vocab_size: int, device: str) -> LogitBias | None:
    entries = [
        (row, token_id, value)
        for row, choice in enumerate(choices)
        for token_id, value in _biases(choice)
        if 0 <= token_id < vocab_size  # a stop token that the model does not have cannot be sampled anyway
    ]
    if not entries:
        return None
    rows, token_ids, values = zip(*entries, strict=True)
    return LogitBias(_integers(rows, device), _integers(token_ids, device), _floats(values, device))


def _biases(choice: Choice) -> Iterable[tuple[int, float]]:
    sampling = choice.spec.sampling
    for token_id, value in (sampling.logit_bias or {}).items():
        yield token_id, value if value > _FORBIDDING_BIAS else _FORBIDDEN
    if choice.position - choice.spec.num_prompt_tokens < sampling.min_tokens:
        for token_id in (*(() if sampling.ignore_eos else choice.spec.eos_token_ids), *sampling.stop_token_ids):
            yield token_id, _FORBIDDEN


def _build_penalties(choices: Sequence[Choice], vocab_size: int, device: str) -> Penalties | None:
    rows = [row for row, choice in enumerate(choices) if _has_penalties(choice.spec.sampling)]
    if not rows:
        return None
    penalised = [choices[row] for row in rows]
    lengths = _integers([choice.position for choice in penalised], device)
    prompt_lengths = [choice.spec.num_prompt_tokens for choice in penalised]
    history = _integers([token_id for choice in penalised for token_id in choice.history], device)
    history_rows = torch.repeat_interleave(torch.arange(len(rows), device=device), lengths)
    first_index = lengths.cumsum(0) - lengths
    position = torch.arange(len(history), device=device) - first_index[history_rows]
    params = [choice.spec.sampling for choice in penalised]
    return Penalties(
        rows=_integers(rows, device),
        repetition=_floats([param.repetition_penalty for param in params], device),
        presence=_floats([param.presence_penalty for param in params], device),
        frequency=_floats([param.frequency_penalty for param in params], device),
        history_rows=history_rows,
        history_token_ids=history,
        history_is_output=position >= _integers(prompt_lengths, device)[history_rows],
    )


def _has_penalties(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)


def _build_random(choices: Sequence[Choice], vocab_size: int, device: str) -> RandomRows | None:
    rows = [row for row, choice in enumerate(choices) if not choice.spec.sampling.is_greedy]
    if not rows:
        return None
    drawn = [choices[row] for row in rows]
    params = [choice.spec.sampling for choice in drawn]
    integers = StepIntegers(
        device,
        rows,
        [param.seed or 0 for param in params],
        [choice.spec.choice for choice in drawn],
        [choice.position for choice in drawn],
    )
    row, seed, of_choice, position = integers.tensors
    return RandomRows(
        rows=row,
        temperature=_floats([param.temperature for param in params], device),
        seed=seed,
        choice=of_choice,
        position=position,
        top_k_top_p=_build_top_k_top_p(params, vocab_size, device),
        min_p=_build_min_p(params, device),
    )


def _build_top_k_top_p(params: Sequence[SamplingParams], vocab_size: int, device: str) -> TopKTopP | None:
    top_k = [min(param.top_k, vocab_size) if param.top_k > 0 else vocab_size for param in params]
    rows = [row for row, param in enumerate(params) if top_k[row] < vocab_size or param.top_p < 1.0]
    if not rows:
        return None
    chosen_top_k = [top_k[row] for row in rows]
    top_p = torch.tensor([params[row].top_p for row in rows], dtype=torch.float64, device=device)
    return TopKTopP(_integers(rows, device), _integers(chosen_top_k, device), top_p, max(chosen_top_k))


def _build_min_p(params: Sequence[SamplingParams], device: str) -> MinP | None:
    rows = [row for row, param in enumerate(params) if param.min_p > 0.0]
    if not rows:
        return None
    return MinP(_integers(rows, device), _floats([params[row].min_p for row in rows], device))


def _integers(values: Sequence[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _floats(values: Sequence[float], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
