"""What rounds of engines that guess, and of one that does not, say: speed-ups with intervals, and what bounds them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from interference import MAX_OTHERS_SHARE
from speculation_runs import DecodingStep, Round

from eagleray.core.acceptance import total_acceptance

# Student's t for 95 %, two-sided, by degrees of freedom from 1 on; beyond the table the last one is a little too wide.
_STUDENT_T: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip

_PAUSE_STEPS: Final = 50  # medians of an engine's steps: a plain one takes so long only where the machine stands still


@dataclass(frozen=True)
class Ratio:
    """A mean of ratios and its confidence interval of 95 %; without an interval from a single pair."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of_pairs(cls, pairs: Sequence[Pair]) -> Ratio:
        """Of two speeds measured in turns: the geometric mean of their ratios, whose logarithms are taken to scatter
        normally. Two engines of equal work differ by some per cent for as long as they live, and each pair of them
        differently: where there are several, the mean of each is one ratio. Without an interval where all but one of
        them were disturbed throughout."""
        by_engines: dict[int, list[float]] = {}
        for pair in [pair for pair in pairs if not pair.is_disturbed] or pairs:
            log = math.log(pair.tokens_per_s / pair.plain_tokens_per_s)
            by_engines.setdefault(pair.engines, []).append(log)
        means = [statistics.fmean(logs) for logs in by_engines.values()]
        has_several = len({pair.engines for pair in pairs}) > 1
        logs = means if has_several else next(iter(by_engines.values()))
        mean = statistics.fmean(logs)
        if len(logs) == 1:
            return cls(math.exp(mean), None, None)
        t = _STUDENT_T[min(len(logs) - 1, len(_STUDENT_T)) - 1]
        half = t * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


@dataclass(frozen=True)
class Pair:
    """Tokens per second of two rounds over the same prompts, one soon after the other."""

    tokens_per_s: float
    plain_tokens_per_s: float
    others_share: float  # of the cores, what other processes used meanwhile
    engines: int = 0  # which ones, of those that were built one after the other
    has_paused: bool = False  # the machine, for a while

    @property
    def is_disturbed(self) -> bool:
        return self.has_paused or self.others_share > MAX_OTHERS_SHARE


@dataclass(frozen=True)
class Figure:
    """One contender at one batch size, against none in the same turns. Times are medians of steps of the whole batch;
    None where there were none. Disturbed rounds count only where there are no others."""

    contender: str
    batch: int
    depth: int | None  # tokens ahead that it guesses; None: its controller decides
    tokens_per_step: float
    rate_per_position: Sequence[float]
    tokens_per_s: float
    plain_tokens_per_s: float
    speed_up: Ratio
    decode_s: float | None  # a step of the engine that does not guess
    verify_s: float | None
    draft_s: float | None  # all tokens ahead
    outside_s: float | None  # of a step, what is neither of the two
    plain_outside_s: float | None  # the same of the engine that does not guess
    prefill_share: float  # of the rounds' time: steps that computed some prompt
    guessing_share: float  # of the steps of the whole batch: those that had guesses to verify
    num_differing_answers: int | None  # from those of the engine that does not guess; None: none were kept
    pairs: Sequence[Pair]  # all of them

    @property
    def counted_pairs(self) -> Sequence[Pair]:
        """Those that the figures are of."""
        return [pair for pair in self.pairs if not pair.is_disturbed] or self.pairs

    @property
    def others_share(self) -> float:
        """The highest of the rounds that counted."""
        return max(pair.others_share for pair in self.counted_pairs)

    @property
    def bound(self) -> float | None:
        """Speed-up if nothing took time but computing: tokens per step * t_decode / (t_verify + depth * t_draft), after
        Leviathan et al. (arXiv 2211.17192). Steps that found nothing to guess take t_decode instead of t_verify. None
        under a controller, whose steps differ."""
        return self._bound(0.0, 0.0)

    @property
    def bound_with_outside(self) -> float | None:
        """The same with the time of every step that is neither computing nor guessing. It is paid less often where
        steps bring more tokens, so that a speed-up can exceed ``bound``."""
        if self.outside_s is None or self.plain_outside_s is None:
            return None
        return self._bound(self.outside_s, self.plain_outside_s)

    def _bound(self, outside_s: float, plain_outside_s: float) -> float | None:
        if self.depth is None or self.decode_s is None or self.verify_s is None or self.draft_s is None:
            return None
        share = self.guessing_share
        step_s = share * self.verify_s + (1 - share) * self.decode_s + self.draft_s
        return self.tokens_per_step * (self.decode_s + plain_outside_s) / (step_s + outside_s)

    @property
    def draft_s_per_token(self) -> float | None:
        """t_draft."""
        return None if self.depth is None or self.draft_s is None else self.draft_s / self.depth


def figure(plain: Sequence[Round], guessing: Sequence[Round], depth: int | None) -> Figure:
    """Of rounds taken in turns over the same prompts."""
    long_s = [
        _PAUSE_STEPS * (_median([step.wall_s for step in _full_steps(rounds)]) or inf) for rounds in (guessing, plain)
    ]
    pairs = [
        Pair(
            taken.tokens_per_s,
            other.tokens_per_s,
            taken.others_share,
            taken.engines,
            any(_longest_plain_step_s(each) > most_s for each, most_s in zip((taken, other), long_s, strict=True)),
        )
        for taken, other in zip(guessing, plain, strict=True)
    ]
    if not all(pair.is_disturbed for pair in pairs):
        plain, guessing = (
            [taken for taken, pair in zip(rounds, pairs, strict=True) if not pair.is_disturbed]
            for rounds in (plain, guessing)
        )
    acceptance = total_acceptance(taken.acceptance for taken in guessing)
    steps, plain_steps = _full_steps(guessing), _full_steps(plain)
    verifying = [step for step in steps if step.num_guesses]
    speeds, plain_speeds = ([taken.tokens_per_s for taken in rounds] for rounds in (guessing, plain))
    return Figure(
        contender=guessing[0].contender,
        batch=guessing[0].batch,
        depth=depth,
        tokens_per_step=1.0 if acceptance is None else acceptance.tokens_per_step,
        rate_per_position=() if acceptance is None else acceptance.rate_per_position,
        tokens_per_s=statistics.median(speeds),
        plain_tokens_per_s=statistics.median(plain_speeds),
        speed_up=Ratio.of_pairs(pairs),
        decode_s=_median([step.verify_s for step in plain_steps]),
        verify_s=_median([step.verify_s for step in verifying]),
        draft_s=_median([step.draft_s for step in steps]),
        outside_s=_median([step.outside_s for step in steps]),
        plain_outside_s=_median([step.outside_s for step in plain_steps]),
        prefill_share=sum(taken.prefill_s for taken in guessing) / sum(taken.duration_s for taken in guessing),
        guessing_share=len(verifying) / len(steps) if steps else 0.0,
        num_differing_answers=None
        if not any(taken.answers for taken in plain)
        else sum(
            ours != theirs
            for taken, other in zip(guessing, plain, strict=True)
            for ours, theirs in zip(taken.answers, other.answers, strict=True)
        ),
        pairs=pairs,
    )


def _full_steps(rounds: Sequence[Round]) -> list[DecodingStep]:
    return [step for taken in rounds for step in taken.steps if step.num_requests == taken.batch]


def _longest_plain_step_s(taken: Round) -> float:
    """Nothing that an engine does makes such a step much longer than others: it neither guesses nor verifies."""
    return max((step.wall_s for step in taken.steps if step.is_plain), default=0.0)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
