"""What rounds of engines that guess, and of one that does not, say: speed-ups with intervals, and what bounds them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from speculation_runs import DecodingStep, Round

from eagleray.core.acceptance import total_acceptance

# Student's t for 95 %, two-sided, by degrees of freedom from 1 on; beyond the table the last one is a little too wide.
_STUDENT_T: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """A mean of ratios and its confidence interval of 95 %; without an interval from a single pair."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of_pairs(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """Of two speeds measured in turns: the geometric mean of their ratios, whose logarithms are taken to scatter
        normally."""
        logs = [math.log(our / their) for our, their in zip(ours, theirs, strict=True)]
        mean = statistics.fmean(logs)
        if len(logs) == 1:
            return cls(math.exp(mean), None, None)
        t = _STUDENT_T[min(len(logs) - 1, len(_STUDENT_T)) - 1]
        half = t * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


@dataclass(frozen=True)
class Figure:
    """One contender at one batch size, against none in the same turns. Times are medians of steps of the whole batch;
    None where there were none."""

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
    guessing_share: float  # of the steps of the whole batch: those that had guesses to verify
    num_differing_answers: int  # from those of the engine that does not guess: none but for near-ties

    @property
    def bound(self) -> float | None:
        """Speed-up if nothing took time but computing: tokens per step * t_decode / (t_verify + depth * t_draft), after
        Leviathan et al. (arXiv 2211.17192). Steps that found nothing to guess take t_decode instead of t_verify. None
        under a controller, whose steps differ."""
        if self.depth is None or self.decode_s is None or self.verify_s is None or self.draft_s is None:
            return None
        share = self.guessing_share
        step_s = share * self.verify_s + (1 - share) * self.decode_s + self.draft_s
        return self.tokens_per_step * self.decode_s / step_s

    @property
    def draft_s_per_token(self) -> float | None:
        """t_draft."""
        return None if self.depth is None or self.draft_s is None else self.draft_s / self.depth


def figure(plain: Sequence[Round], guessing: Sequence[Round], depth: int | None) -> Figure:
    """Of rounds taken in turns over the same prompts."""
    batch = guessing[0].batch
    acceptance = total_acceptance(taken.acceptance for taken in guessing)
    steps = _full_steps(guessing)
    verifying = [step for step in steps if step.num_guesses]
    speeds, plain_speeds = ([taken.tokens_per_s for taken in rounds] for rounds in (guessing, plain))
    return Figure(
        contender=guessing[0].contender,
        batch=batch,
        depth=depth,
        tokens_per_step=1.0 if acceptance is None else acceptance.tokens_per_step,
        rate_per_position=() if acceptance is None else acceptance.rate_per_position,
        tokens_per_s=statistics.median(speeds),
        plain_tokens_per_s=statistics.median(plain_speeds),
        speed_up=Ratio.of_pairs(speeds, plain_speeds),
        decode_s=_median([step.verify_s for step in _full_steps(plain)]),
        verify_s=_median([step.verify_s for step in verifying]),
        draft_s=_median([step.draft_s for step in steps]),
        guessing_share=len(verifying) / len(steps) if steps else 0.0,
        num_differing_answers=sum(
            ours != theirs
            for taken, other in zip(guessing, plain, strict=True)
            for ours, theirs in zip(taken.answers, other.answers, strict=True)
        ),
    )


def _full_steps(rounds: Sequence[Round]) -> list[DecodingStep]:
    return [step for taken in rounds for step in taken.steps if step.num_requests == taken.batch]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
