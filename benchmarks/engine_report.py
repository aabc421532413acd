"""What the benchmark of one engine found, and the tables made of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from engine_runs import Operation
from floors import Machine
from interference import MAX_OTHERS_SHARE, mark
from provenance import Provenance
from report import Section, percent


@dataclass(frozen=True)
class Timing:
    """One repeat of a figure."""

    tokens_per_s: float
    others_share: float  # of the cores, what other processes used meanwhile
    floor_tokens_per_s: float  # what the machine allowed before its round: hosts give more and less within minutes

    @property
    def is_disturbed(self) -> bool:
        return self.others_share > MAX_OTHERS_SHARE

    @property
    def share(self) -> float:
        """Of its floor."""
        return self.tokens_per_s / self.floor_tokens_per_s


@dataclass(frozen=True)
class Figure:
    """A speed, and the highest that the machine allows."""

    name: str
    tokens_per_s: float  # medians, of the repeats that nobody disturbed; of all where there is none
    floor_tokens_per_s: float
    share: float  # of its own floor, each repeat
    timings: Sequence[Timing]
    is_disturbed: bool  # every repeat was

    @property
    def num_undisturbed(self) -> int:
        return sum(not timing.is_disturbed for timing in self.timings)


def figure_of(name: str, timings: Sequence[Timing]) -> Figure:
    counted = counted_of(timings)
    tokens_per_s = statistics.median(timing.tokens_per_s for timing in counted)
    floor = statistics.median(timing.floor_tokens_per_s for timing in counted)
    share = statistics.median(timing.share for timing in counted)
    return Figure(name, tokens_per_s, floor, share, timings, is_disturbed=counted[0].is_disturbed)


def counted_of(timings: Sequence[Timing]) -> Sequence[Timing]:
    """Those that nobody disturbed; all, where there is none."""
    return [timing for timing in timings if not timing.is_disturbed] or timings


@dataclass(frozen=True)
class StepSplit:
    """Where the time of a decoding step goes. ``outside_s`` is what no kernel accounts for: Python, what torch does
    for sampling and for building tensors, and waiting."""

    batch: int
    step_s: float
    outside_s: float
    num_calls: float  # of Python and C functions, on all threads: the same in every run
    others_share: float
    loop_s: float = 0.0  # of outside: update and schedule, between two steps
    hand_over_s: float = 0.0  # of outside: to the executor's thread and back

    @property
    def executor_s(self) -> float:
        """Of outside: tensors, sampling and their like, on the executor's thread."""
        return self.outside_s - self.loop_s - self.hand_over_s


@dataclass(frozen=True)
class Profile:
    """What every operation takes of one prefill, or of the mean decoding step of ``num_steps``."""

    name: str
    total_s: float
    num_steps: int
    by_operation: Mapping[str, Operation]  # over all steps
    others_share: float

    def rows(self) -> list[tuple[str, str, str, str]]:
        by_time = sorted(self.by_operation.items(), key=lambda item: -item[1].seconds)
        kernels_s = sum(operation.seconds for operation in self.by_operation.values())
        return [
            *((name, self._milliseconds(each.seconds), *_rates(each)) for name, each in by_time),
            ("all kernels", self._milliseconds(kernels_s), "-", "-"),
            ("outside kernels", self._milliseconds(self.total_s - kernels_s), "-", "-"),
        ]

    def _milliseconds(self, seconds: float) -> str:
        return f"{seconds / self.num_steps * 1e3:.2f}"


def _rates(operation: Operation) -> tuple[str, str]:
    rates = operation.flop / operation.seconds / 1e12, operation.weight_bytes / operation.seconds / 1e9
    return f"{rates[0]:.2f}" if rates[0] else "-", f"{rates[1]:.1f}" if rates[1] else "-"


@dataclass(frozen=True)
class Run:
    """Everything about one run."""

    origin: Provenance
    model: str
    dtype: str
    options: dict[str, Any]
    machines: Sequence[Machine]  # before each round of repeats
    figures: Sequence[Figure]
    splits: Sequence[StepSplit]
    profiles: Sequence[Profile]
    computes_with: str = ""
    weights_in_huge_pages: float | None = None  # share of the packed ones; None where there are none

    def title(self) -> str:
        origin, read, multiplied, others = self.origin, *zip(*map(astuple, self.machines), strict=True)
        return (
            f"{self.model}, {self.dtype}, quantization {self.options['quantization']}, threads "
            f"{self.options['threads']}, {origin.num_cores} x {origin.cpu}, commit {origin.git_commit}, {origin.date}; "
            f"read {min(read) / 1e9:.1f} to {max(read) / 1e9:.1f} GB/s, multiplied {min(multiplied) / 1e12:.2f} to "
            f"{max(multiplied) / 1e12:.2f} TFLOP/s{mark(max(others))}; {self.computes_with}; "
            f"{percent(self.weights_in_huge_pages)} of the packed weights in huge pages. Shares of the floor count "
            "from this report, comparisons with other engines from compare.py's. Operations are of steps that are not "
            "replayed, under clocks in Python: in the mean they take more together than the kernels of a replayed step."
        )


def sections(run: Run) -> list[Section]:
    splits = [
        (
            str(split.batch), f"{split.step_s * 1e3:.2f}", f"{(split.step_s - split.outside_s) * 1e3:.2f}",
            f"{split.outside_s * 1e3:.2f}", f"{split.outside_s / split.step_s:.1%}", f"{split.loop_s * 1e3:.2f}",
            f"{split.hand_over_s * 1e3:.2f}", f"{split.executor_s * 1e3:.2f}", f"{split.num_calls:,.0f}",
            f"{split.others_share:.1%}{mark(split.others_share)}",
        )
        for split in run.splits
    ]  # fmt: skip
    shown = [
        Section(
            (
                "tokens per second",
                "measured",
                "floor",
                "share",
                "share, least to most",
                "repeats",
                "undisturbed",
                "others at most",
            ),
            list(map(_figure_row, run.figures)),
        ),
        Section(
            (
                "decode, replayed, batch",
                "step, ms",
                "kernels, ms",
                "outside, ms",
                "share",
                "the loop, ms",
                "hand-over to the thread, ms",
                "executor, ms",
                "calls",
                "others",
            ),
            splits,
        ),
    ]
    if len({split.batch for split in run.splits}) > 1:
        shown.append(Section(("of what a step costs beside kernels", "each step", "each sequence in it"), _slopes(run)))
    for profile in run.profiles:
        name = f"{profile.name}{mark(profile.others_share)}"
        shown.append(Section((name, "ms", "TFLOP/s", "GB/s of weights"), profile.rows()))
    return [section for section in shown if section.rows]


def _slopes(run: Run) -> list[tuple[str, str, str]]:
    """A straight line through the smallest and the largest batch."""
    small, *_, large = sorted(run.splits, key=lambda split: split.batch)

    def line(of_small: float, of_large: float) -> tuple[float, float]:
        per_sequence = (of_large - of_small) / (large.batch - small.batch)
        return of_small - small.batch * per_sequence, per_sequence

    outside = [f"{seconds * 1e6:,.0f}" for seconds in line(small.outside_s, large.outside_s)]
    calls = [f"{count:,.0f}" for count in line(small.num_calls, large.num_calls)]
    share = mark(max(small.others_share, large.others_share))
    batches = f"batch {small.batch} to {large.batch}"
    return [(f"outside, us, {batches}{share}", *outside), (f"calls, {batches}", *calls)]  # type: ignore[list-item]


def _figure_row(figure: Figure) -> tuple[str, ...]:
    name = f"{figure.name}, disturbed" if figure.is_disturbed else figure.name
    counted = counted_of(figure.timings)
    shares = [timing.share for timing in counted]
    return (
        name,
        f"{figure.tokens_per_s:,.1f}",
        f"{figure.floor_tokens_per_s:,.0f}",
        f"{figure.share:.1%}",
        f"{min(shares):.1%} to {max(shares):.1%}",
        str(len(figure.timings)),
        str(figure.num_undisturbed),
        f"{max(timing.others_share for timing in counted):.1%}",
    )
