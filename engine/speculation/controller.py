"""How much to guess, step by step: what brings most tokens per second by what has been measured.

    tokens per second = requests * tokens per request and step / (time to verify + time to guess)

Tokens per step depend on the text, times on the machine and the number of requests; each is followed by itself, so that
a change of one is soon understood. What looks bad is tried again now and then, since texts change, but so rarely that
trying costs at most one part in a hundred of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from eagleray.engine.speculation.tree import DraftShape

_Key = TypeVar("_Key")
_SMOOTHING: Final = 0.1  # weight of the newest measurement
_MAX_WEIGHT: Final = 0.5
_TRYING_SHARE: Final = 0.01  # of the time
_MIN_STEPS_BETWEEN_TRIALS: Final = 20
_GAIN_TO_GUESS: Final = 1.02  # guessing must promise so much more than not guessing: measurements are noisy


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a step that only decoded took."""

    num_requests: int
    num_rows: int  # known tokens and guesses
    verify_s: float
    draft_s: float
    drafted: DraftShape | None  # what the step guessed


class DraftPolicy(Protocol):
    """How much to guess for the next step."""

    @property
    def has_network(self) -> bool:
        """Who guesses has KV of its own, which must keep up with the text."""
        ...

    def choose(self, num_decoding: int) -> DraftShape | None:
        """The shape of the guesses for ``num_decoding`` requests, or None: do not guess."""
        ...

    def slots_needed(self, shape: DraftShape) -> int:
        """Slots of KV that guessing takes after a request's last known token."""
        ...

    def note_acceptance(self, shape: DraftShape, num_tokens: Sequence[int]) -> None:
        """Requests for which ``shape`` was guessed got so many tokens each."""
        ...

    def note_times(self, times: StepTimes) -> None:
        """How long a step took that only decoded."""
        ...


class NoDrafts:
    """Implements ``DraftPolicy`` without speculation."""

    has_network = False

    def choose(self, num_decoding: int) -> DraftShape | None:
        return None

    def slots_needed(self, shape: DraftShape) -> int:
        return 0

    def note_acceptance(self, shape: DraftShape, num_tokens: Sequence[int]) -> None:
        pass

    def note_times(self, times: StepTimes) -> None:
        pass


@dataclass(frozen=True, slots=True)
class FixedDrafts:
    """Implements ``DraftPolicy``: always the same."""

    shape: DraftShape
    has_network: bool = True  # that guesses with KV of its own: for the last known token and for the nodes it expands

    def choose(self, num_decoding: int) -> DraftShape | None:
        return self.shape

    def slots_needed(self, shape: DraftShape) -> int:
        return 1 + shape.num_expanded if self.has_network else 0

    def note_acceptance(self, shape: DraftShape, num_tokens: Sequence[int]) -> None:
        pass

    def note_times(self, times: StepTimes) -> None:
        pass


class AdaptiveDrafts:
    """Implements ``DraftPolicy``: the best of some shapes, or none."""

    def __init__(self, shapes: Sequence[DraftShape], has_network: bool) -> None:
        self._choices: tuple[DraftShape | None, ...] = (None, *shapes)
        self.has_network = has_network
        self._tokens_per_step: dict[DraftShape, float] = {}
        self._verify_s: _Followed[int] = _Followed()  # by ``_size_class`` of the rows
        # By ``_size_class`` of the requests. A network keeps up with the text even while nothing is guessed.
        self._draft_s: _Followed[tuple[DraftShape | None, int]] = _Followed()
        self._num_steps = 0
        self._steps_since_trial = 0
        self._next_trial = 0  # of the choices, in turn

    def choose(self, num_decoding: int) -> DraftShape | None:
        if num_decoding == 0:
            return None
        rates = {shape: self._tokens_per_s(shape, num_decoding) for shape in self._choices}
        best = max(self._choices, key=lambda shape: rates[shape])
        chosen = best if rates[best] > _GAIN_TO_GUESS * rates[None] else None
        trial = self._choices[self._next_trial % len(self._choices)]
        lost = rates[best] / rates[trial] - 1.0  # steps' worth of time that a trial costs
        self._steps_since_trial += 1
        if self._steps_since_trial <= max(_MIN_STEPS_BETWEEN_TRIALS, 2 * lost / _TRYING_SHARE):
            return chosen
        self._steps_since_trial = 0
        self._next_trial += 1
        return trial

    def slots_needed(self, shape: DraftShape) -> int:
        return 1 + shape.num_expanded if self.has_network else 0

    def note_acceptance(self, shape: DraftShape, num_tokens: Sequence[int]) -> None:
        for count in num_tokens:
            old = self._tokens_per_step.get(shape, self._expected_tokens(shape))
            self._tokens_per_step[shape] = old + _SMOOTHING / len(num_tokens) ** 0.5 * (count - old)

    def note_times(self, times: StepTimes) -> None:
        self._num_steps += 1
        self._verify_s.note(_size_class(times.num_rows), times.verify_s, self._num_steps)
        self._draft_s.note((times.drafted, _size_class(times.num_requests)), times.draft_s, self._num_steps)

    def _tokens_per_s(self, shape: DraftShape | None, num_requests: int) -> float:
        """Per request. Before anything has been measured a shape looks good, so that it is tried."""
        num_nodes = 0 if shape is None else shape.max_nodes
        # More rows than ever measured are taken to cost nothing: often they do.
        step_s = self._verify_s.at_or_below(_size_class(num_requests * (1 + num_nodes)), otherwise=1.0)
        draft_s = self._draft_s.get((shape, _size_class(num_requests)), otherwise=0.0)
        return self._expected_tokens(shape) / (step_s + draft_s)

    def _expected_tokens(self, shape: DraftShape | None) -> float:
        return 1.0 if shape is None else self._tokens_per_step.get(shape, 1.0 + shape.depth / 2)


def _size_class(count: int) -> int:
    """Counts that cost about the same: exact up to 8, then in steps of an eighth to a quarter."""
    step = 1 << max(0, count.bit_length() - 4)
    return count // step * step


class _Followed(Generic[_Key]):
    """Smoothed measurements. One that comes after a long time counts more: what it replaces is old."""

    def __init__(self) -> None:
        self._values: dict[_Key, tuple[float, int]] = {}  # and the step of the newest measurement

    def note(self, key: _Key, value: float, step: int) -> None:
        old, when = self._values.get(key, (value, step))
        weight = min(_MAX_WEIGHT, 1.0 - (1.0 - _SMOOTHING) ** max(1, step - when))
        self._values[key] = (old + weight * (value - old), step)

    def get(self, key: _Key, otherwise: float) -> float:
        return self._values[key][0] if key in self._values else otherwise

    def at_or_below(self: _Followed[int], size: int, otherwise: float) -> float:
        """The measurement of the next smaller size, or the smallest."""
        known = [other for other in self._values if other <= size] or [min(self._values, default=0)]
        return self.get(max(known), otherwise)
