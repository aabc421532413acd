"""A step's runs after their guesses have been verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.scheduling.plan import ScheduledRun
from eagleray.engine.speculation.tree import DraftShape


@dataclass(frozen=True, slots=True)
class VerifiedRun:
    """One run, with what it sampled."""

    run: ScheduledRun
    first_row: int  # of the run, in the step's batch
    accepted: tuple[int, ...] = ()  # nodes of its draft that came true, in order
    sampled: tuple[int, ...] = ()  # their tokens and the one after them; none if the run does not sample

    @property
    def num_computed(self) -> int:
        """Tokens of the request whose KV is in place."""
        return self.run.end + len(self.accepted)

    @property
    def num_known(self) -> int:
        """Tokens of the request up to what it sampled."""
        return self.run.end + len(self.sampled)

    def token_ids(self, first: int, end: int) -> list[int]:
        """Those at positions ``first`` up to ``end``."""
        known = self.run.end
        sampled = self.sampled[max(0, first - known) : max(0, end - known)]
        return [*self.run.known_token_ids[first : min(end, known)], *sampled]

    @property
    def last_row(self) -> int:
        """In the step's batch, of the token at position ``num_computed - 1``."""
        return self.first_row + self.run.num_tokens + (self.accepted[-1] if self.accepted else -1)

    @property
    def rows(self) -> list[int]:
        """In the step's batch, of the tokens at positions ``run.start`` up to ``num_computed``."""
        guesses = self.first_row + self.run.num_tokens
        return [*range(self.first_row, guesses), *(guesses + node for node in self.accepted)]

    def slots(self, positions: Sequence[int], block_size_tokens: int) -> list[int]:
        """Where the KV of ``positions`` lies in a pool: block * block_size + offset."""
        size = block_size_tokens
        return [self.run.block_ids[position // size] * size + position % size for position in positions]


@dataclass(frozen=True, slots=True)
class VerifiedStep:
    """What a proposer sees of a step. T rows as in the step's batch."""

    runs: tuple[VerifiedRun, ...]
    hidden_TD: Tensor  # after the target's final norm
    features_TF: Tensor  # what the proposer's companion has made of the step; without one the hidden states
    kv: KVTensors
    shape: DraftShape | None  # what to guess, for runs that may draft
