"""What the controller has measured: how long steps take by their size, how often guesses come true, and what trials
have cost."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Final

_SMOOTHING: Final = 0.1  # weight of the newest in what is smoothed
_MEASUREMENTS: Final = 25  # of one kind that count
_MANY: Final = 15  # so many tell what a step takes: fewer are told of then
_LOW: Final = 0.15  # of them lie below what counts: other programs disturb many steps, and none to the better
_OLD_STEPS: Final = 400  # what is older counts no more, where three measurements are younger
_OUT_OF_ORDER: Final = 1.1  # so far measurements may contradict each other: they are noisy
_ACCEPTANCE: Final = 0.6  # of a guess, before anything is known
_WEIGHT_OF_ACCEPTANCE: Final = 3.0  # guesses that this belief is worth
_FORGETTING: Final = 0.01  # of what is known of acceptance, per step of one request
_LEAST_KEPT: Final = 0.37  # of it at once, however long ago and of however many it was learned: trials tell little
_COST_OF_ROWS: Final = 0.3  # share of a step that grows with its rows, before anything is known
_MOST_LOST: Final = 8  # steps, by one: beyond that the machine has paused
_MOST_USUAL: Final = 2.0  # known costs that a usual step takes: beyond that others disturb it


class GuessAcceptance:
    """How likely a guess comes true when the one before it has, by how far ahead it is."""

    def __init__(self) -> None:
        self._true: list[float] = []  # guesses, the older the less they count
        self._all: list[float] = []
        self._newest_steps: list[int | None] = []  # that told of each; none: all of it is belief
        self.share_found = 1.0  # of the guesses that were asked for: look-up may find none

    def note(self, num_accepted: Sequence[int], depth: int, step: int) -> None:
        """Of requests for which a guess was made for each of ``depth`` tokens ahead. Forgets by the steps that have
        passed since a position was last told of, so that what was learned of another text does not outweigh a trial.
        """
        while len(self._all) < depth:
            self._true.append(_ACCEPTANCE * _WEIGHT_OF_ACCEPTANCE)
            self._all.append(_WEIGHT_OF_ACCEPTANCE)
            self._newest_steps.append(None)
        # Many requests tell in few steps what a text is like, and smooth out each other's chance.
        kept_per_step = 1.0 - min(0.5, _FORGETTING * len(num_accepted) ** 0.5)
        for level in range(depth):
            num_all = sum(1 for accepted in num_accepted if accepted >= level)
            if num_all:
                num_true = sum(1 for accepted in num_accepted if accepted > level)
                newest_step = self._newest_steps[level]
                num_steps = 1 if newest_step is None else max(1, step - newest_step)
                kept = max(_LEAST_KEPT, kept_per_step**num_steps)
                self._newest_steps[level] = step
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


class TrialLosses:
    """What trials have cost beside what was known to be best, whatever made them dear: guesses that did not come true,
    programs that were recorded, other weights in the caches. In steps, so that it counts for any number of requests."""

    def __init__(self) -> None:
        self._lost_steps = 0.0
        self._of_trial = 0.0  # of the one under way, or told of just now
        self._usual_steps = 1.0  # that a usual step takes on average: costs are low quantiles

    def note(self, took_steps: float, worth_steps: float) -> None:
        """A trial's step took as long as so many of the best choice are known to take, which would bring its tokens in
        ``worth_steps``."""
        self._of_trial += min(took_steps / self._usual_steps - worth_steps, _MOST_LOST)

    def note_usual(self, took_steps: float) -> None:
        """A plain step, where that is the best choice."""
        self._usual_steps += _SMOOTHING * (min(max(1.0, took_steps), _MOST_USUAL) - self._usual_steps)

    def end_trial(self) -> None:
        """All of its steps have been told of. What it has gained pays for others, but not in advance."""
        self._lost_steps, self._of_trial = max(0.0, self._lost_steps + self._of_trial), 0.0

    def leave_room(self, more_steps: float, paid_steps: float) -> bool:
        """Whether another one may lose ``more_steps``, where all together may lose ``paid_steps``."""
        return self._lost_steps + self._of_trial + more_steps <= paid_steps


class Costs:
    """Seconds by size: a low quantile of the latest measurements."""

    def __init__(self) -> None:
        self._measured: dict[int, deque[tuple[float, int]]] = {}  # by size class: seconds, and in which step
        self._seconds: dict[int, float] = {}
        self._sizes: list[int] = []  # classes that were measured, rising
        self._num_told: dict[int, int] = {}  # measurements that this rests on, of this or of larger sizes
        self._unread: dict[int, None] = {}  # classes measured since anybody asked, the latest last

    def note(self, size: int, seconds: float, step: int) -> None:
        """Little work: a step of a small model is not much longer than its accounts."""
        size = size_class(size)
        measured = self._measured.get(size)
        if measured is None:
            insort(self._sizes, size)
            measured = self._measured[size] = deque(maxlen=_MEASUREMENTS)
        measured.append((seconds, step))
        while len(measured) > 3 and measured[0][1] < step - _OLD_STEPS:
            measured.popleft()
        self._unread.pop(size, None)
        self._unread[size] = None

    def _read(self) -> None:
        for size in self._unread:
            measured = self._measured[size]
            if not measured:  # set aside just now, for those of a larger size
                continue
            self._seconds[size] = new = quantile([value for value, _ in measured], _LOW)
            self._num_told[size] = len(measured)
            newest_step = measured[-1][1]
            for smaller in self._sizes[: bisect_left(self._sizes, size)]:
                if self._seconds.get(smaller, 0.0) > _OUT_OF_ORDER * new:  # faster since then: fewer take no longer
                    self._seconds[smaller] = _OUT_OF_ORDER * new
                    later = [each for each in self._measured[smaller] if each[1] > newest_step]
                    self._measured[smaller] = deque(later, maxlen=_MEASUREMENTS)
                    self._num_told[smaller] = len(measured)
        self._unread.clear()

    @property
    def has_any(self) -> bool:
        return bool(self._sizes)

    def is_disturbed(self, size: int) -> bool:
        """Whether measurements of one size say very different things."""
        if self._unread:
            self._read()
        values = [value for value, _ in self._measured.get(size_class(size), ())]
        return len(values) > 4 and quantile(values, 1 - _LOW) > 2 * quantile(values, _LOW)

    def is_well_known(self, size: int) -> bool:
        return len(self._measured.get(size_class(size), ())) >= _MANY

    def at(self, size: int, otherwise: float, enough: int = 1) -> float:
        """As measured, or on a straight line through the sizes around it; ``otherwise`` before any measurement. Sizes
        with fewer than ``enough`` measurements count as not measured."""
        if self._unread:
            self._read()
        size = size_class(size)
        if self._num_told.get(size, 0) >= enough:
            return self._seconds[size]
        sizes = [known for known in self._sizes if self._num_told[known] >= enough]
        if not sizes:
            return otherwise
        place = bisect_left(sizes, size)
        if len(sizes) == 1:
            return self._seconds[sizes[0]] * (1.0 + _COST_OF_ROWS * (size / sizes[0] - 1.0))
        is_inside = 0 < place < len(sizes)
        low, high = (sizes[place - 1], sizes[place]) if is_inside else (sizes[0], sizes[-1])
        low_s, high_s = self._seconds[low], self._seconds[high]
        # More rows take no less time, and not more than in proportion.
        slope = min(max(0.0, (high_s - low_s) / (high - low)), high_s / high)
        nearest = high if size > high else low
        return self._seconds[nearest] + slope * (size - nearest)


def quantile(values: Sequence[float], share: float) -> float:
    """What a ``share`` of all that the values were drawn from is expected to be below: else what was measured seldom
    would look dearer, or cheaper, than what was measured often. Of too few for that, their lowest (type 6 of Hyndman
    and Fan, "Sample quantiles in statistical packages", 1996)."""
    ordered, place = sorted(values), (len(values) + 1) * share - 1
    below = min(max(int(place), 0), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + max(0.0, place - below) * (ordered[above] - ordered[below])


def size_class(count: int) -> int:
    """Counts that cost about the same: exact up to 8, then in steps of an eighth to a quarter."""
    step = 1 << max(0, count.bit_length() - 4)
    return count // step * step
