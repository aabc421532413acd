"""How much to guess, step by step: what brings most tokens per second by what has been measured.

    seconds per token = (time to verify + time to guess) / tokens per request and step

Tokens per step depend on the text, times on the machine and the number of requests; each is followed by itself, and
what was learned from one shape or batch serves the others: a chain's guesses come true as those of a longer one do, and
rows that were never verified are taken to cost what the sizes around them say. So little has to be tried. What is
tried, because texts change, is paid for: trials may lose one step in a hundred, by the clock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final, Protocol

import msgspec

from eagleray.engine.speculation.measurements import Costs, GuessAcceptance, TrialLosses, size_class
from eagleray.engine.speculation.tree import DraftShape

_TRYING_SHARE: Final = 0.01  # of the steps
_MIN_STEPS_BETWEEN_TRIALS: Final = 20
_MOST_PATIENCE: Final = 8  # so many times as long until the next trial of what has lost several in a row
_STEPS_BEFORE: Final = 2  # a trial's first verifies what was guessed before it, its second is unlike that one
_ENOUGH: Final = 8  # measurements, where other programs disturb many steps: fewer are not believed
_STEPS_OF_DECISION: Final = 4  # while as many requests decode: to decide takes time itself
_STEPS_WITHOUT: Final = 30  # guesses, where they do not pay: then little is learned that would change it
_HEARD_OF_THEM: Final = 2  # the last of those
_UNUSUAL_TIMES: Final = 2  # the first of their kind: memory is touched, and steps are recorded to be replayed
_PAID_STEPS: Final = 40  # trials may lose as much from the beginning, and later their share of the steps
_MOST_LEFT_OUT: Final = 8  # of those that cost about the same: then the others have to do
_COST_OF_LEVEL: Final = 0.1  # guessing one token ahead, in steps of the target, before anything is known
_GAIN_TO_GUESS: Final = 1.02  # guessing must promise so much more than not guessing: measurements are noisy
_GAIN_TO_BEGIN: Final = 1.04  # and to begin with it so much: what few guesses say of acceptance is noisier
_GAIN_TO_CHANGE: Final = 1.01  # and another way to guess so much more than the one before


class StepTimes(msgspec.Struct, frozen=True):
    """What a step that only decoded took."""

    num_requests: int
    num_rows: int  # known tokens and guesses
    verify_s: float
    draft_s: float
    drafted: DraftShape | None  # what the step guessed
    verified: DraftShape | None = None  # what the one before did
    num_caught_up: int = 0  # tokens of earlier steps that the network took in beside the newest ones
    outside_s: float = 0.0  # beside both: scheduling, taking tokens in, waiting for cores; more where more is verified
    is_like_the_last: bool = True  # the step before verified what the same shape had guessed
    tokens_each: float = 1.0  # that it brought, of each request


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

    def note_times(self, times: StepTimes) -> int:
        """How long a step took that only decoded. Returns how many need not be told of after it, as long as nothing is
        guessed or verified: telling takes time itself."""
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

    def note_times(self, times: StepTimes) -> int:
        return 0


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

    def note_times(self, times: StepTimes) -> int:
        return 0


class AdaptiveDrafts:
    """Implements ``DraftPolicy``: the best of some shapes, or none."""

    def __init__(self, shapes: Sequence[DraftShape], has_network: bool, may_defer: bool = False) -> None:
        self.may_defer = may_defer
        self._has_network = has_network
        # Shapes of several depths that are alike in the rest share what is known of their guesses.
        acceptances = {_kind(shape): GuessAcceptance() for shape in shapes}
        self._none = _Option(None, GuessAcceptance())
        self._options = {shape: _Option(shape, acceptances[_kind(shape)]) for shape in shapes}
        self._choices = (self._none, *self._options.values())
        self._verify_s = Costs()  # by rows; with all that a step takes but guessing
        self._level_s = Costs()  # of guessing one token ahead, by requests
        self._catch_up_s = Costs()  # of a network while nothing is guessed, per token: of size 1
        self._enough = 1  # measurements to be believed
        self._losses = TrialLosses()
        self._num_seen: Counter[Hashable] = Counter()  # steps, by what they computed
        self._num_left_out: Counter[Hashable] = Counter()  # of them, those that were not measured, by about how much
        self._num_steps = self._num_decoding = self._max_rows = 0  # with those of the latest step
        self._last_trial = 0
        self._chosen = self._usual = self._none
        self._decided_for = 0  # so many requests
        self._steps_left = 0  # with what is chosen
        self._is_settled = False  # that guessing does not pay, and for how long steps take
        self._is_trial = False  # what is chosen: only to find out
        # Whether steps were that: the one before the step that is told of, that one, and the newest.
        self._trials = deque([False] * 3, maxlen=3)
        self._tried: _Option | None = None  # by a trial under way, or by one still to be judged
        self._is_tried_measured = False

    def choose(self, num_decoding: int, max_rows: int) -> DraftShape | None:
        if num_decoding == 0:
            self._trials.append(False)
            return None
        self._num_steps += 1
        self._num_decoding, self._max_rows = num_decoding, max_rows
        if self._is_settled and self._steps_left > 0 and num_decoding == self._decided_for:
            self._steps_left -= 1  # as in most steps where guessing does not pay: there is nothing to find out
            self._none.last_used = self._num_steps
            return None
        has_changed = num_decoding != self._decided_for and not (self._is_trial and self._trials[-1])
        if self._steps_left <= 0 or has_changed or not _fits(self._chosen, num_decoding, max_rows):
            self._decide()
        self._steps_left -= 1
        self._trials.append(self._is_trial)
        if self._is_trial:
            self._last_trial = self._num_steps
        self._chosen.last_used = self._num_steps
        return self._chosen.shape

    def slots_needed(self, shape: DraftShape) -> int:
        return 1 + shape.num_expanded if self._has_network else 0

    def note_acceptance(self, shape: DraftShape, num_guesses: int, num_tokens: Sequence[int]) -> None:
        acceptance = self._options[shape].acceptance
        acceptance.note([count - 1 for count in num_tokens], shape.depth, self._num_steps)
        # Of the same requests whose tokens count: another's guesses were cut, or it came too late to be guessed for.
        acceptance.note_found(num_guesses / (len(num_tokens) * shape.max_nodes))

    def note_times(self, times: StepTimes) -> int:
        size, step, verify_s = times.num_requests, self._num_steps, times.verify_s + times.outside_s
        was_verified_for_trial, was_drafted_for_trial, _ = self._trials
        if was_verified_for_trial or was_drafted_for_trial:
            self._note_loss(times, verify_s + times.draft_s)
        is_usual = self._count((size, times.num_rows), size_class(times.num_rows))
        if is_usual and times.is_like_the_last:  # else other weights and programs are in the caches: a tenth dearer
            if self._usual is self._none and times.drafted is None and times.verified is None:
                self._losses.note_usual((verify_s + times.draft_s) / self._s_per_token(self._none, size))
            self._verify_s.note(times.num_rows, verify_s, step)
            self._is_tried_measured |= self._tried is not None and times.verified == self._tried.shape
        if times.drafted is None:
            if times.num_caught_up:
                self._catch_up_s.note(1, times.draft_s / times.num_caught_up, step)
        elif not times.num_caught_up:
            option = self._options[times.drafted]
            if self._count((size, times.drafted), (size_class(size), times.drafted)):
                option.draft_s.note(size, times.draft_s, step)
                self._level_s.note(size, times.draft_s / times.drafted.depth, step)
        if self._steps_left <= 0:  # here, where nobody waits
            self._decide()
        return self._steps_left - _HEARD_OF_THEM if self._is_settled else 0

    def _note_loss(self, times: StepTimes, took_s: float) -> None:
        """Of a step of a trial. While other programs make steps longer it is not known."""
        if self._enough == _ENOUGH or not self._verify_s.has_any:
            return
        shape = self._usual.shape
        tokens = self._usual.acceptance.tokens_per_step(shape.depth) if shape else 1.0
        step_s = tokens * self._s_per_token(self._usual, times.num_requests)
        self._losses.note(took_s / step_s, times.tokens_each / tokens)

    def _count(self, kind: Hashable, like: Hashable) -> bool:
        """Whether a step of this kind is measured.

        What takes long at first says nothing of how long it takes from then on. Where hardly two steps are of one kind,
        nothing would ever be measured: of those that are ``like`` each other only the first ones are left out."""
        self._num_seen[kind] += 1
        is_first = self._num_seen[kind] <= _UNUSUAL_TIMES
        self._num_left_out[like] += is_first
        return not is_first or self._num_left_out[like] > _MOST_LEFT_OUT

    def _decide(self) -> None:
        num_decoding = self._num_decoding
        self._enough = _ENOUGH if self._verify_s.is_disturbed(num_decoding) else 1
        costs = {
            option: self._s_per_token(option, num_decoding) if _fits(option, num_decoding, self._max_rows) else inf
            for option in self._choices
        }
        self._decided_for, self._usual = num_decoding, self._best(costs)
        if not self._is_trial and not any(self._trials):  # else its last times are not told yet
            self._judge_trial()
        trial = self._due_for_trial(costs, self._usual, num_decoding)
        self._is_trial, self._is_settled = trial is not None, False
        if trial is not None:
            self._chosen, self._steps_left = trial, self._steps_of_trial(trial, num_decoding)
            self._tried, self._is_tried_measured = trial, False
            return
        does_not_pay = self._usual is self._none and self._verify_s.has_any and inf not in costs.values()
        does_not_pay &= self._tried is None
        self._chosen = self._usual
        self._steps_left = _STEPS_WITHOUT if does_not_pay else _STEPS_OF_DECISION
        self._is_settled = does_not_pay and self._verify_s.is_well_known(num_decoding)

    def _judge_trial(self) -> None:
        """One that was cut off before it was measured tells nothing."""
        self._losses.end_trial()
        if self._tried is not None and self._is_tried_measured:
            has_lost = self._tried is not self._usual
            self._tried.num_lost_trials = self._tried.num_lost_trials + 1 if has_lost else 0
        self._tried = None

    def _best(self, costs: Mapping[_Option, float]) -> _Option:
        """What it was before, unless another choice promises more than measurements are wrong by."""
        gain = _GAIN_TO_BEGIN if self._usual is self._none else _GAIN_TO_GUESS
        promising = [option for option in costs if gain * costs[option] < costs[self._none]]
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
        paid_steps = _PAID_STEPS + _TRYING_SHARE * self._num_steps
        for option, cost in costs.items():
            lost_steps = self._steps_of_trial(option, num_decoding) * (cost / costs[best] - 1.0)
            patience = min(1 + option.num_lost_trials, _MOST_PATIENCE)
            is_paid_for = patience * lost_steps <= share * (self._num_steps - option.last_used)
            if option is not best and is_paid_for and self._losses.leave_room(lost_steps, paid_steps):
                return option
        return None

    def _num_rows(self, option: _Option, num_decoding: int) -> int:
        """With as many guesses as were found of late."""
        guesses = option.acceptance.share_found * option.shape.max_nodes if option.shape else 0
        return round(num_decoding * (1 + guesses))

    def _steps_of_trial(self, option: _Option, num_decoding: int) -> int:
        """That it takes to measure it, after the first of its kind; of the last ones is told when they are over."""
        num_rows = num_decoding * (1 + (option.shape.max_nodes if option.shape else 0))
        first_steps = max(0, _UNUSUAL_TIMES - self._num_seen[num_decoding, num_rows])
        return _STEPS_BEFORE + self._enough + first_steps

    def _s_per_token(self, option: _Option, num_requests: int) -> float:
        """Of one request."""
        plain_s = self._verify_s.at(num_requests, 1.0)
        shape = option.shape
        if shape is None:
            return plain_s + num_requests * self._catch_up_s.at(1, 0.0)
        num_rows = self._num_rows(option, num_requests)
        step_s = self._verify_s.at(num_rows, self._verify_s.at(num_rows, 1.0), self._enough) + self._draft_s(
            option, shape, num_requests
        )
        return step_s / option.acceptance.tokens_per_step(shape.depth)

    def _draft_s(self, option: _Option, shape: DraftShape, num_requests: int) -> float:
        """Of guessing once."""
        level_s = _COST_OF_LEVEL * self._verify_s.at(num_requests, 1.0)
        level_s = self._level_s.at(num_requests, level_s, self._enough)
        return option.draft_s.at(num_requests, shape.depth * level_s, self._enough)


def _fits(option: _Option, num_decoding: int, max_rows: int) -> bool:
    return option.shape is None or num_decoding * (1 + option.shape.max_nodes) <= max_rows


def _kind(shape: DraftShape) -> tuple[int, int, tuple[tuple[int, ...], ...]]:
    return shape.branching, shape.num_nodes, shape.paths


@dataclass(slots=True, eq=False)
class _Option:
    """What is known of one choice."""

    shape: DraftShape | None
    acceptance: GuessAcceptance
    draft_s: Costs = field(default_factory=Costs)  # of all tokens ahead, by requests
    last_used: int = 0  # step
    num_lost_trials: int = 0  # in a row, after which something else was better all the same
