"""What one turn of the engine's loop takes beside the step itself: on the executor's way, and beside it.

    python benchmarks/scheduling.py

The executor computes nothing. ``docs/decisions/0023-scheduling-waits-for-the-step.md`` says what the figures are for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from interference import mark, undisturbed
from null_engine import NullExecutor, NullStep
from provenance import provenance
from report import Section, to_markdown

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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the engine's loop around an executor that computes nothing.")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 32), help="requests that decode together")
    parser.add_argument("--steps", type=int, default=1024, help="of each batch")
    options = parser.parse_args(arguments)
    rows, worst_share = [], 0.0
    for batch in options.batches:
        turns, share = undisturbed(lambda batch=batch: list(decode(batch, options.steps)))
        worst_share = max(worst_share, share)
        means = [
            statistics.fmean(getattr(turn, part) for turn in turns) for part in ("update_s", "schedule_s", "report_s")
        ]
        rows.append((str(batch), *(f"{1e6 * mean:.0f}" for mean in means)))
    origin = provenance()
    print(
        f"{origin.num_cores} x {origin.cpu}, commit {origin.git_commit}, {origin.date}; others used at most "
        f"{worst_share:.1%} of the cores{mark(worst_share)}\n"
    )
    print(to_markdown([Section(("batch", "update, us a step", "schedule, us", "report, us (overlapped)"), rows)]))
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
