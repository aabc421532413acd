"""What the controller has measured: how long steps take by their size, how often guesses come true, and what the first
steps of a kind take beyond others."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from statistics import fmean, median_low
from typing import Final

_SMOOTHING: Final = 0.1  # weight of the newest share of guesses that were found
_MEASUREMENTS: Final = 25  # of one kind that count: their median, which a disturbed step or a few do not move
_OLD_STEPS: Final = 400  # what is older counts no more, where three measurements are younger
_OUT_OF_ORDER: Final = 1.1  # so far measurements may contradict each other: they are noisy
_ACCEPTANCE: Final = 0.6  # of a guess, before anything is known
_WEIGHT_OF_ACCEPTANCE: Final = 3.0  # guesses that this belief is worth
_FORGETTING: Final = 0.01  # of what is known of acceptance, per step of one request
_COST_OF_ROWS: Final = 0.3  # share of a step that grows with its rows, before anything is known
_MOST_BEYOND: Final = 4  # steps that a first time may take more: beyond that the machine has paused


class GuessAcceptance:
    """How likely a guess comes true when the one before it has, by how far ahead it is."""

    def __init__(self) -> None:
        self._true: list[float] = []  # guesses, the older the less they count
        self._all: list[float] = []
        self.share_found = 1.0  # of the guesses that were asked for: look-up may find none

    def note(self, num_accepted: Sequence[int], depth: int) -> None:
        """Of requests for which a guess was made for each of ``depth`` tokens ahead."""
        while len(self._all) < depth:
            self._true.append(_ACCEPTANCE * _WEIGHT_OF_ACCEPTANCE)
            self._all.append(_WEIGHT_OF_ACCEPTANCE)
        # Many requests tell in few steps what a text is like, and smooth out each other's chance.
        kept = 1.0 - min(0.5, _FORGETTING * len(num_accepted) ** 0.5)
        for level in range(depth):
            num_all = sum(1 for accepted in num_accepted if accepted >= level)
            if num_all:
                num_true = sum(1 for accepted in num_accepted if accepted > level)
                self._true[level] = kept * self._true[level] + num_true
                self._all[level] = kept * self._all[level] + num_all

    def note_found(self, share: float) -> None:
        """Of the guesses that a step asked for."""
        self.share_found += _SMOOTHING * (share - self.share_found)

    def tokens_per_step(self, depth: int) -> float:
        tokens = reached = 1.0
        for level in range(depth):
            reached *= self._true[level] / self._all[level] if level < len(self._all) else _ACCEPTANCE
            tokens += reached
        return tokens


class FirstTimes:
    """What the first steps of a kind take beyond others, and how many of them trials have caused."""

    def __init__(self) -> None:
        self._beyond_s: deque[float] = deque(maxlen=_MEASUREMENTS)
        self._num_in_trials = 0

    def note(self, beyond_s: float, step_s: float, is_trial: bool) -> None:
        """One took ``beyond_s`` more than it will from then on, where a step takes ``step_s``."""
        self._beyond_s.append(min(max(0.0, beyond_s), _MOST_BEYOND * step_s))
        self._num_in_trials += is_trial

    def is_paid_for(self, count: int, paid_s: float) -> bool:
        """Whether trials may cause so many more, where all of theirs together may take ``paid_s``."""
        return count == 0 or not self._beyond_s or (self._num_in_trials + count) * fmean(self._beyond_s) <= paid_s


class Costs:
    """Seconds by size: medians of the latest measurements."""

    def __init__(self) -> None:
        self._measured: dict[int, deque[tuple[float, int]]] = {}  # by size class: seconds, and in which step
        self._medians: dict[int, float] = {}
        self._sizes: list[int] = []  # classes that were measured, rising

    def note(self, size: int, seconds: float, step: int) -> None:
        size = size_class(size)
        if size not in self._measured:
            insort(self._sizes, size)
            self._measured[size] = deque(maxlen=_MEASUREMENTS)
        measured = self._measured[size]
        measured.append((seconds, step))
        while len(measured) > 3 and measured[0][1] < step - _OLD_STEPS:
            measured.popleft()
        self._medians[size] = new = median_low([value for value, _ in measured])
        for smaller in self._sizes[: bisect_left(self._sizes, size)]:
            if self._medians[smaller] > _OUT_OF_ORDER * new:  # faster since then: fewer rows take no longer than more
                self._medians[smaller] = _OUT_OF_ORDER * new
                self._measured[smaller].clear()

    @property
    def has_any(self) -> bool:
        return bool(self._sizes)

    def at(self, size: int, otherwise: float) -> float:
        """As measured, or on a straight line through the sizes around it; ``otherwise`` before any measurement."""
        size = size_class(size)
        if size in self._medians:
            return self._medians[size]
        if not self._sizes:
            return otherwise
        place = bisect_left(self._sizes, size)
        if len(self._sizes) == 1:
            return self._medians[self._sizes[0]] * (1.0 + _COST_OF_ROWS * (size / self._sizes[0] - 1.0))
        is_inside = 0 < place < len(self._sizes)
        low, high = (self._sizes[place - 1], self._sizes[place]) if is_inside else (self._sizes[0], self._sizes[-1])
        low_s, high_s = self._medians[low], self._medians[high]
        # More rows take no less time, and not more than in proportion.
        slope = min(max(0.0, (high_s - low_s) / (high - low)), high_s / high)
        nearest = high if size > high else low
        return self._medians[nearest] + slope * (size - nearest)


def size_class(count: int) -> int:
    """Counts that cost about the same: exact up to 8, then in steps of an eighth to a quarter."""
    step = 1 << max(0, count.bit_length() - 4)
    return count // step * step
