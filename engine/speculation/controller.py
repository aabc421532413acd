"""How much to guess, step by step: what brings most tokens per second by what has been measured.

    seconds per token = (time to verify + time to guess) / tokens per request and step

Tokens per step depend on the text, times on the machine and the number of requests; each is followed by itself, and
what was learned from one shape or batch serves the others: a chain's guesses come true as those of a longer one do, and
rows that were never verified are taken to cost what the sizes around them say. So little has to be tried. What is
tried, because texts change, is paid for: all trials together may lose one part in a hundred of the time, and one more
on what first steps of a kind take beyond others.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import median_low
from typing import Final, Protocol

from eagleray.engine.speculation.tree import DraftShape

_SMOOTHING: Final = 0.1  # weight of the newest share of guesses that were found
_MEASUREMENTS: Final = 25  # of one kind that count: their median, which a disturbed step or a few do not move
_OLD_STEPS: Final = 400  # what is older counts no more, where three measurements are younger
_TRYING_SHARE: Final = 0.01  # of the time
_MIN_STEPS_BETWEEN_TRIALS: Final = 20
_MOST_PATIENCE: Final = 4  # so many times as long until the next trial of what has lost several in a row
_STEPS_OF_TRIAL: Final = 2  # the first one may have to bring a network up to date before it can guess
_STEPS_OF_DECISION: Final = 4  # while as many requests decode: to decide takes time itself
_STEPS_WITHOUT: Final = 16  # guesses: then little is learned that would change it
_UNUSUAL_TIMES: Final = 2  # the first of their kind: memory is touched, and steps are recorded to be replayed
_FIRST_TIMES: Final = 20  # trials may take the time of so many steps for them, before their share of the time does
_MOST_LEFT_OUT: Final = 8  # of those that cost about the same: then medians have to do
_OUT_OF_ORDER: Final = 1.1  # so far measurements may contradict each other: they are noisy
_ACCEPTANCE: Final = 0.6  # of a guess, before anything is known
_WEIGHT_OF_ACCEPTANCE: Final = 3.0  # guesses that this belief is worth
_FORGETTING: Final = 0.01  # of what is known of acceptance, per step of one request
_COST_OF_ROWS: Final = 0.3  # share of a step that grows with its rows, before anything is known
_COST_OF_LEVEL: Final = 0.1  # guessing one token ahead, in steps of the target, before anything is known
_GAIN_TO_GUESS: Final = 1.02  # guessing must promise so much more than not guessing: measurements are noisy
_GAIN_TO_CHANGE: Final = 1.01  # and another way to guess so much more than the one before


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a step that only decoded took."""

    num_requests: int
    num_rows: int  # known tokens and guesses
    verify_s: float
    draft_s: float
    drafted: DraftShape | None  # what the step guessed
    verified: DraftShape | None = None  # what the one before did
    num_caught_up: int = 0  # tokens of earlier steps that the network took in beside the newest ones
    outside_s: float = 0.0  # beside both: scheduling, taking tokens in, waiting for cores; more where more is verified


class DraftPolicy(Protocol):
    """How much to guess for the next step."""

    @property
    def may_defer(self) -> bool:
        """While nothing is guessed the KV of who guesses need not keep up with the text."""
        ...

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        """The shape of the guesses for ``num_decoding`` requests, or None: do not guess. A step has room for
        ``max_rows`` of their known tokens and guesses; guesses beyond that are not verified. None of them may have
        decoded yet: then the step brings their first tokens."""
        ...

    def slots_needed(self, shape: DraftShape) -> int:
        """Slots of KV that guessing takes after a request's last known token."""
        ...

    def note_acceptance(self, shape: DraftShape, num_guesses: int, num_tokens: Sequence[int]) -> None:
        """Requests for which ``shape`` was asked for got so many tokens each; ``num_guesses`` were found for all of
        them together. Told, as times are, while the next step computes already: after what that one guesses was chosen.
        """
        ...

    def note_times(self, times: StepTimes) -> None:
        """How long a step took that only decoded."""
        ...


class NoDrafts:
    """Implements ``DraftPolicy`` without speculation."""

    may_defer = False

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        return None

    def slots_needed(self, shape: DraftShape) -> int:
        return 0

    def note_acceptance(self, shape: DraftShape, num_guesses: int, num_tokens: Sequence[int]) -> None:
        pass

    def note_times(self, times: StepTimes) -> None:
        pass


@dataclass(frozen=True, slots=True)
class FixedDrafts:
    """Implements ``DraftPolicy``: always the same, but where guessing costs anything no more tokens ahead than a step
    has room to verify."""

    shape: DraftShape
    has_network: bool = True  # that guesses with KV of its own: for the last known token and for the nodes it expands
    may_defer: bool = False

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        if num_decoding == 0 or not self.has_network:
            return self.shape
        most_guesses = -(-max_rows // num_decoding) - 1  # of a request: some may get one more than others
        if most_guesses <= 0:
            return None
        return DraftShape(most_guesses) if self.shape.is_chain and self.shape.depth > most_guesses else self.shape

    def slots_needed(self, shape: DraftShape) -> int:
        return 1 + shape.num_expanded if self.has_network else 0

    def note_acceptance(self, shape: DraftShape, num_guesses: int, num_tokens: Sequence[int]) -> None:
        pass

    def note_times(self, times: StepTimes) -> None:
        pass


class AdaptiveDrafts:
    """Implements ``DraftPolicy``: the best of some shapes, or none."""

    def __init__(self, shapes: Sequence[DraftShape], has_network: bool, may_defer: bool = False) -> None:
        self.may_defer = may_defer
        self._has_network = has_network
        # Shapes of several depths that are alike in the rest share what is known of their guesses.
        acceptances = {_kind(shape): _Acceptance() for shape in shapes}
        self._none = _Option(None, _Acceptance())
        self._options = {shape: _Option(shape, acceptances[_kind(shape)]) for shape in shapes}
        self._choices = (self._none, *self._options.values())
        self._verify_s = _Costs()  # by rows; with all that a step takes but guessing
        self._level_s = _Costs()  # of guessing one token ahead, by requests
        self._catch_up_s = _Costs()  # of a network while nothing is guessed, per token: of size 1
        self._first_times = _FirstTimes()
        self._num_seen: Counter[Hashable] = Counter()  # steps, by what they computed
        self._num_left_out: Counter[Hashable] = Counter()  # of them, those that were not measured, by about how much
        self._num_steps = 0
        self._last_trial = 0
        self._chosen = self._usual = self._none
        self._steps_left = 0  # with what is chosen
        self._is_trial = False  # what is chosen: only to find out
        self._tried: _Option | None = None  # the latest one of which that was so, until it has been judged
        self._is_tried_measured = False
        self._num_decoding = 0  # when it was chosen
        self._max_rows = 0  # of the latest step

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        if num_decoding == 0:
            return None
        self._num_steps += 1
        self._max_rows = max_rows
        has_changed = num_decoding != self._num_decoding and not self._is_trial
        if self._steps_left <= 0 or has_changed or not _fits(self._chosen, num_decoding, max_rows):
            self._decide(num_decoding)
        self._steps_left -= 1
        if self._is_trial:
            self._last_trial = self._num_steps
        self._chosen.last_used = self._num_steps
        return self._chosen.shape

    def slots_needed(self, shape: DraftShape) -> int:
        return 1 + shape.num_expanded if self._has_network else 0

    def note_acceptance(self, shape: DraftShape, num_guesses: int, num_tokens: Sequence[int]) -> None:
        acceptance = self._options[shape].acceptance
        acceptance.note([count - 1 for count in num_tokens], shape.depth)
        # Of the same requests whose tokens count: another's guesses were cut, or it came too late to be guessed for.
        acceptance.note_found(num_guesses / (len(num_tokens) * shape.max_nodes))

    def note_times(self, times: StepTimes) -> None:
        size, step, verify_s = times.num_requests, self._num_steps, times.verify_s + times.outside_s
        self._first_times.all_s += verify_s + times.draft_s
        if self._is_usual((size, times.num_rows), _size_class(times.num_rows)):
            self._verify_s.note(times.num_rows, verify_s, step)
            self._is_tried_measured |= self._tried is not None and times.verified == self._tried.shape
        else:
            self._first_times.note(verify_s, self._verify_s.at(times.num_rows, verify_s), self._is_trial)
        if times.drafted is None:
            if times.num_caught_up:
                self._catch_up_s.note(1, times.draft_s / times.num_caught_up, step)
        elif not times.num_caught_up:
            option = self._options[times.drafted]
            if self._is_usual((size, times.drafted), (_size_class(size), times.drafted)):
                option.draft_s.note(size, times.draft_s, step)
                self._level_s.note(size, times.draft_s / times.drafted.depth, step)
            else:
                self._first_times.note(times.draft_s, self._draft_s(option, times.drafted, size), self._is_trial)
        if self._steps_left <= 0:  # here, where nobody waits
            self._decide(self._num_decoding)

    def _is_usual(self, kind: Hashable, like: Hashable) -> bool:
        """What takes long at first says nothing of how long it takes from then on. Where hardly two steps are of one
        kind, nothing would ever be measured: of those that are ``like`` each other only the first ones are left out."""
        self._num_seen[kind] += 1
        if self._num_seen[kind] > _UNUSUAL_TIMES:
            return True
        self._num_left_out[like] += 1
        return self._num_left_out[like] > _MOST_LEFT_OUT

    def _decide(self, num_decoding: int) -> None:
        costs = {
            option: self._s_per_token(option, num_decoding) if _fits(option, num_decoding, self._max_rows) else inf
            for option in self._choices
        }
        self._num_decoding, self._usual = num_decoding, self._best(costs)
        if self._tried is not None and self._is_tried_measured:
            has_lost = self._tried is not self._usual
            self._tried.num_lost_trials = self._tried.num_lost_trials + 1 if has_lost else 0
            self._tried = None
        trial = self._due_for_trial(costs, self._usual, num_decoding)
        self._is_trial = trial is not None
        if trial is None:
            self._chosen = self._usual
            self._steps_left = _STEPS_OF_DECISION if self._usual.shape else _STEPS_WITHOUT
        else:
            self._chosen, self._steps_left = trial, self._steps_of_trial(trial, num_decoding)
            self._tried, self._is_tried_measured = trial, False

    def _best(self, costs: Mapping[_Option, float]) -> _Option:
        """What it was before, unless another choice promises more than measurements are wrong by."""
        promising = [option for option in costs if _GAIN_TO_GUESS * costs[option] < costs[self._none]]
        if not self._verify_s.has_any or not promising:
            return self._none
        best = min(promising, key=costs.__getitem__)
        is_as_good = self._usual in promising and costs[self._usual] <= _GAIN_TO_CHANGE * costs[best]
        return self._usual if is_as_good else best

    def _due_for_trial(self, costs: Mapping[_Option, float], best: _Option, num_decoding: int) -> _Option | None:
        """What else to try now. Each other choice may lose the same share of the time, so that what loses little is
        tried often; the less often, the more often in a row it has lost."""
        if self._num_steps - self._last_trial < _MIN_STEPS_BETWEEN_TRIALS:
            return None
        share = _TRYING_SHARE / max(1, len(self._options))
        first_times_left = self._first_times.allowed(self._verify_s.at(num_decoding, 0.0))
        for option, cost in costs.items():
            lost_steps = self._steps_of_trial(option, num_decoding) * (cost / costs[best] - 1.0)
            patience = min(1 + option.num_lost_trials, _MOST_PATIENCE)
            is_paid_for = patience * lost_steps <= share * (self._num_steps - option.last_used)
            if option is not best and is_paid_for and sum(self._first_kinds(option, num_decoding)) <= first_times_left:
                return option
        return None

    def _steps_of_trial(self, option: _Option, num_decoding: int) -> int:
        """Until it has been measured."""
        return _STEPS_OF_TRIAL + self._first_kinds(option, num_decoding)[0]

    def _first_kinds(self, option: _Option, num_decoding: int) -> tuple[int, int]:
        """First times that it still has before it: (of verifying, of guessing)."""
        num_rows = num_decoding * (1 + (option.shape.max_nodes if option.shape else 0))
        kinds = ((num_decoding, num_rows), (num_decoding, option.shape))
        verify, draft = (max(0, _UNUSUAL_TIMES - self._num_seen[kind]) for kind in kinds)
        return verify, draft if option.shape else 0

    def _s_per_token(self, option: _Option, num_requests: int) -> float:
        """Of one request."""
        plain_s = self._verify_s.at(num_requests, 1.0)
        shape = option.shape
        if shape is None:
            return plain_s + num_requests * self._catch_up_s.at(1, 0.0)
        num_rows = round(num_requests * (1 + option.acceptance.share_found * shape.max_nodes))
        step_s = self._verify_s.at(num_rows, 1.0) + self._draft_s(option, shape, num_requests)
        return step_s / option.acceptance.tokens_per_step(shape.depth)

    def _draft_s(self, option: _Option, shape: DraftShape, num_requests: int) -> float:
        """Of guessing once."""
        level_s = self._level_s.at(num_requests, _COST_OF_LEVEL * self._verify_s.at(num_requests, 1.0))
        return option.draft_s.at(num_requests, shape.depth * level_s)


def _fits(option: _Option, num_decoding: int, max_rows: int) -> bool:
    return option.shape is None or num_decoding * (1 + option.shape.max_nodes) <= max_rows


def _kind(shape: DraftShape) -> tuple[int, int, tuple[tuple[int, ...], ...]]:
    return shape.branching, shape.num_nodes, shape.paths


class _Acceptance:
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


class _FirstTimes:
    """What the first steps of a kind take beyond others, and how much of that trials may still cause."""

    def __init__(self) -> None:
        self.all_s = 0.0  # that all steps took
        self._sum_s = self._in_trials_s = 0.0
        self._count = 0

    def note(self, measured_s: float, usual_s: float, is_trial: bool) -> None:
        beyond_s = max(0.0, measured_s - usual_s)
        self._sum_s += beyond_s
        self._in_trials_s += beyond_s * is_trial
        self._count += 1

    def allowed(self, step_s: float) -> float:
        """How many, where a step takes ``step_s``."""
        left_s = _FIRST_TIMES * step_s + _TRYING_SHARE * self.all_s - self._in_trials_s
        return inf if self._sum_s == 0.0 else left_s * self._count / self._sum_s


class _Costs:
    """Seconds by size: medians of the latest measurements."""

    def __init__(self) -> None:
        self._measured: dict[int, deque[tuple[float, int]]] = {}  # by size class: seconds, and in which step
        self._medians: dict[int, float] = {}
        self._sizes: list[int] = []  # classes that were measured, rising
        self._new: set[int] = set()  # measured since medians were last wanted

    def note(self, size: int, seconds: float, step: int) -> None:
        size = _size_class(size)
        if size not in self._measured:
            insort(self._sizes, size)
            self._measured[size] = deque(maxlen=_MEASUREMENTS)
        measured = self._measured[size]
        measured.append((seconds, step))
        while len(measured) > 3 and measured[0][1] < step - _OLD_STEPS:
            measured.popleft()
        self._new.add(size)

    def _update_medians(self) -> None:
        for size in sorted(self._new):
            self._medians[size] = new = median_low([value for value, _ in self._measured[size]])
            for smaller in self._sizes[: bisect_left(self._sizes, size)]:
                if self._medians.get(smaller, 0.0) > _OUT_OF_ORDER * new:
                    # Faster since then: fewer rows take no longer than more.
                    self._medians[smaller] = _OUT_OF_ORDER * new
                    self._measured[smaller].clear()
        self._new.clear()

    @property
    def has_any(self) -> bool:
        return bool(self._sizes)

    def at(self, size: int, otherwise: float) -> float:
        """As measured, or on a straight line through the sizes around it; ``otherwise`` before any measurement."""
        if self._new:
            self._update_medians()
        size = _size_class(size)
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


@dataclass(slots=True, eq=False)
class _Option:
    """What is known of one choice."""

    shape: DraftShape | None
    acceptance: _Acceptance
    draft_s: _Costs = field(default_factory=_Costs)  # of all tokens ahead, by requests
    last_used: int = 0  # step
    num_lost_trials: int = 0  # in a row, after which something else was better all the same


def _size_class(count: int) -> int:
    """Counts that cost about the same: exact up to 8, then in steps of an eighth to a quarter."""
    step = 1 << max(0, count.bit_length() - 4)
    return count // step * step
