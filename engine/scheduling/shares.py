"""Dividing what is not enough for all."""

from __future__ import annotations

from collections.abc import Sequence

from eagleray.engine.scheduling.plan import ScheduledRun


def even_shares(wanted: Sequence[int], total: int) -> list[int]:
    """At most ``total`` in all, nobody more than wanted. What one does not want is for the others."""
    shares = [0] * len(wanted)
    by_want = sorted(range(len(wanted)), key=wanted.__getitem__)
    for place, index in enumerate(by_want):
        shares[index] = min(wanted[index], total // (len(wanted) - place))
        total -= shares[index]
    return shares


def half(num_tokens: int) -> int:
    return -(-num_tokens // 2)


class StepBudget:
    """Rows that a step has left. While some decode, prompts get half of them at most: then requests that came together
    end further apart, and prompts that come after them wait for fewer others
    (docs/decisions/0025-half-of-a-step-for-prompts.md)."""

    def __init__(self, num_rows: int, has_decoding: bool) -> None:
        self._left = num_rows
        self._left_for_prompts = half(num_rows) if has_decoding else num_rows

    @property
    def is_left(self) -> bool:
        """For whoever is to begin."""
        return self._left > 0 and self._left_for_prompts > 0

    def share(self, num_missing: int) -> int:
        """Tokens to compute of those that a request lacks; who lacks one alone waits for it, and is no prompt."""
        return min(1, self._left) if num_missing == 1 else min(num_missing, self._left, self._left_for_prompts)

    def take(self, run: ScheduledRun) -> None:
        self._left -= run.num_rows
        if run.num_tokens > 1 or not run.samples:  # also the one token of a prompt for which there was room
            self._left_for_prompts -= run.num_tokens
