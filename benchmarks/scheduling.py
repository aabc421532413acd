"""What one turn of the engine's loop takes beside the step itself: on the executor's way, and beside it.

    python benchmarks/scheduling.py
    python benchmarks/scheduling.py --batches 1 64 --json result.json --markdown

The executor computes nothing. ``docs/decisions/0023-scheduling-waits-for-the-step.md`` says what the figures are for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec
from interference import mark, undisturbed
from null_engine import NullExecutor, NullStep
from provenance import Provenance, provenance
from report import Section, to_markdown, to_terminal
from rich.console import Console

from eagleray.core.clock import SystemClock
from eagleray.core.config import DEMO_MODEL_PATH, EngineConfig
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.scheduling.plan import StepPlan
from eagleray.text.output import OutputText
from eagleray.text.tokenizer import Tokenizer

PROMPT_TOKENS: Final = 32
BLOCK_SIZE_TOKENS: Final = 16
UNTIMED_STEPS: Final = 64
LETTER_ID: Final = 70  # any that is text


class StampingExecutor(NullExecutor):
    """Knows when a step was last submitted."""

    submitted_s = 0.0

    def submit(self, plan: StepPlan) -> NullStep:
        self.submitted_s = time.perf_counter()
        return super().submit(plan)


@dataclass(frozen=True)
class Turn:
    """Seconds of one turn, in which the executor idles but for the last."""

    update_s: float  # from the step's end to its tokens being known
    schedule_s: float  # from there to the next step's submission
    report_s: float  # text and outputs, while the next step computes


@dataclass(frozen=True)
class Line:
    """Of one batch."""

    batch: int
    turns: list[Turn]
    others_share: float  # of the cores, what other processes used meanwhile

    def mean_us(self, part: str) -> float:
        return 1e6 * statistics.fmean(getattr(turn, part) for turn in self.turns)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    origin, lines = provenance(), [_measure(batch, options.steps) for batch in options.batches]
    shown = [_section(lines)]
    if options.markdown:
        print(f"{_title(origin, lines)}\n\n{to_markdown(shown)}")
    else:
        Console().print(_title(origin, lines), to_terminal(shown), sep="\n", highlight=False, markup=False)
    if options.json:
        everything = {"provenance": asdict(origin), "lines": [asdict(line) for line in lines]}
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(everything)) + b"\n")
    return 0


def _measure(batch: int, num_steps: int) -> Line:
    turns, others_share = undisturbed(lambda: list(decode(batch, num_steps)))
    return Line(batch, turns, others_share)


def decode(batch: int, num_steps: int) -> Iterator[Turn]:
    """Turns in which ``batch`` requests decode, each as a worker makes it."""
    tokenizer = Tokenizer.from_folder(DEMO_MODEL_PATH)
    executor = StampingExecutor(BLOCK_SIZE_TOKENS, (LETTER_ID,))
    engine = Engine(
        executor, EngineConfig(max_num_seqs=batch), SystemClock(),
        lambda spec: OutputText(tokenizer, spec.sampling, spec.token_ids),
    )  # fmt: skip
    for number in range(batch):
        engine.add(_spec(number, UNTIMED_STEPS + num_steps + batch))
    for turn in range(UNTIMED_STEPS + num_steps):
        start_s = time.perf_counter()
        engine.wait()
        known_s = time.perf_counter()
        engine.begin()
        begun_s = time.perf_counter()
        engine.report()
        if turn >= UNTIMED_STEPS:
            yield Turn(known_s - start_s, executor.submitted_s - known_s, time.perf_counter() - begun_s)


def _spec(number: int, max_tokens: int) -> RequestSpec:
    token_ids = tuple(range(100 * number + 8, 100 * number + 8 + PROMPT_TOKENS))
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return RequestSpec(request_id=str(number), token_ids=token_ids, num_prompt_tokens=PROMPT_TOKENS, sampling=sampling)


# ---- what is shown


def _title(origin: Provenance, lines: Sequence[Line]) -> str:
    others = f"others used at most {max(line.others_share for line in lines):.1%} of the cores"
    return f"{origin.date}, {origin.cpu}, {origin.num_cores} cores, {origin.git_commit}; {others}"


def _section(lines: Sequence[Line]) -> Section:
    header = ("batch", "update, us a step", "schedule, us", "report, us (overlapped)", "others")
    rows = [
        (
            str(line.batch), *(f"{line.mean_us(part):.0f}" for part in ("update_s", "schedule_s", "report_s")),
            f"{line.others_share:.1%}{mark(line.others_share)}",
        )
        for line in lines
    ]  # fmt: skip
    return Section(header, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scheduling.py",
        description="Time the engine's loop around an executor that computes nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--batches", type=int, nargs="+", default=(1, 8, 32), help="requests that decode together")
    add("--steps", type=int, default=1024, help="of each batch")
    add("--json", type=Path, help="write everything to this file")
    add("--markdown", action="store_true", help="print the report as Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
