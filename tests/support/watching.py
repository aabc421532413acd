"""An offline engine's steps, seen by a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from eagleray import LLM
from eagleray.engine.engine import StepOutcome


@contextmanager
def watched(llm: LLM) -> Iterator[list[StepOutcome]]:
    """What its steps bring."""
    outcomes: list[StepOutcome] = []
    take_step = llm.engine.step

    def watched_step() -> StepOutcome:
        outcomes.append(take_step())
        return outcomes[-1]

    llm.engine.step = watched_step  # type: ignore[method-assign]
    try:
        yield outcomes
    finally:
        llm.engine.step = take_step  # type: ignore[method-assign]
