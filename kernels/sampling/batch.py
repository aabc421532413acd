"""What a step asks of the sampler, as tensors. Each extra lists only the rows that have it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Values added to single logits of the raw output; minus infinity forbids a token."""

    rows: Tensor  # int64 [E]
    token_ids: Tensor  # int64 [E], each within the vocabulary
    values: Tensor  # float32 [E]


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties for tokens that have been seen, over P rows with H tokens of history in all."""

    rows: Tensor  # int64 [P]
    repetition: Tensor  # float32 [P]; over prompt and output; 1 is none
    presence: Tensor  # float32 [P]; over the output; 0 is none
    frequency: Tensor  # float32 [P]; over the output; 0 is none
    history_rows: Tensor  # int64 [H]: index into ``rows``
    history_token_ids: Tensor  # int64 [H]
    history_is_output: Tensor  # bool [H]


@dataclass(frozen=True, slots=True)
class TopKTopP:
    """Truncation of K rows of ``RandomRows`` to their most probable tokens."""

    rows: Tensor  # int64 [K]: index into ``RandomRows.rows``
    top_k: Tensor  # int64 [K]; the size of the vocabulary is none
    top_p: Tensor  # float64 [K]; 1 is none
    max_top_k: int  # the largest of ``top_k``, known without asking the device


@dataclass(frozen=True, slots=True)
class MinP:
    """Truncation of M rows of ``RandomRows`` to tokens that are at least so likely, relative to the likeliest."""

    rows: Tensor  # int64 [M]: index into ``RandomRows.rows``
    min_p: Tensor  # float32 [M], above 0


@dataclass(frozen=True, slots=True)
class RandomRows:
    """The S rows with temperature above 0."""

    rows: Tensor  # int64 [S], ascending
    temperature: Tensor  # float32 [S]
    seed: Tensor  # int64 [S]
    choice: Tensor  # int64 [S]
    position: Tensor  # int64 [S]: index of the sampled token in the request
    top_k_top_p: TopKTopP | None = None
    min_p: MinP | None = None


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """All rows of a step. Rows that are not in ``random`` are greedy."""

    bias: LogitBias | None = None
    penalties: Penalties | None = None
    random: RandomRows | None = None

    @property
    def is_greedy(self) -> bool:
        """The best token of each row, as the logits are."""
        return self.bias is None and self.penalties is None and self.random is None


@dataclass(frozen=True, slots=True)
class SharedNoise:
    """What R rows share with the target whose choice they guess."""

    temperature: Tensor  # float32 [R]; 0: the target takes the best token
    seed: Tensor  # int64 [R]
    choice: Tensor  # int64 [R]
    position: Tensor  # int64 [R]: index of the guessed token in the request


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of one given token per row and of the best alternatives."""

    logprob: Tensor  # float32 [R]
    rank: Tensor  # int64 [R]; 1 is the most probable
    top_ids: Tensor  # int64 [R, K], best first, the lower id first among equals
    top_logprobs: Tensor  # float32 [R, K]
