"""Timing several ways to do one thing in turns, A B C A B C: what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from interference import undisturbed

Action = Callable[[int], object]  # gets the number of the round: what it works on may differ, so that no cache has it


@dataclass(frozen=True)
class Turns:
    """What each of the ways took."""

    times_s: Mapping[str, list[float]]
    others_share: float  # of the cores, what other processes used meanwhile

    @property
    def medians_s(self) -> dict[str, float]:
        return {name: statistics.median(times_s) for name, times_s in self.times_s.items()}


def time_in_turns(actions: Mapping[str, Action], duration_s: float, min_rounds: int = 5) -> Turns:
    """Rounds for about ``duration_s``, after one that warms up; tried again when others disturb them."""
    first = 0

    def rounds() -> dict[str, list[float]]:
        nonlocal first
        times_s: dict[str, list[float]] = {name: [] for name in actions}
        _one_round(actions, first)
        end_s, number = time.perf_counter() + duration_s, first + 1
        while time.perf_counter() < end_s or number <= first + min_rounds:
            for name, duration in _one_round(actions, number).items():
                times_s[name].append(duration)
            number += 1
        first = number
        return times_s

    return Turns(*undisturbed(rounds))


def _one_round(actions: Mapping[str, Action], number: int) -> dict[str, float]:
    times_s = {}
    for name, action in actions.items():
        start_s = time.perf_counter()
        action(number)
        times_s[name] = time.perf_counter() - start_s
    return times_s
