"""What a worker measures of itself: smoothed rates and totals, for its snapshot."""

from __future__ import annotations

from typing import Final

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.engine.engine import StepOutcome

_SMOOTHING: Final = 0.2  # weight of the newest step


class StepMeter:
    """Smoothed speed of steps. Used by the step thread only."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self.cached_tokens_total = 0
        self.prompt_tokens_total = 0
        self.output_tokens_total = 0
        self.acceptance: Acceptance | None = None

    def note(self, outcome: StepOutcome, step_s: float) -> None:
        for output in outcome.outputs:
            self.output_tokens_total += len(output.token_ids)
            self.cached_tokens_total += output.num_cached_tokens or 0
        if outcome.acceptance is not None:
            self.acceptance = total_acceptance((self.acceptance, outcome.acceptance))
        if outcome.decode_only:
            self.decode_step_s = smoothed(self.decode_step_s, step_s)
        elif step_s > 0:
            self.prefill_tokens_per_s = smoothed(self.prefill_tokens_per_s, outcome.num_computed_tokens / step_s)


def smoothed(old: float, new: float) -> float:
    """Exponentially weighted mean; the first measurement counts whole."""
    return new if old == 0.0 else old + _SMOOTHING * (new - old)
