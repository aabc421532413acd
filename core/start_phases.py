"""Where the time of a start goes."""

from __future__ import annotations

from collections.abc import Callable

from eagleray.core.clock import Clock


class StartPhases:
    """Cuts a start into phases. Each begins where the one before ended, so that they add up to the whole.

    Args:
        clock: measures.
        on_end: hears of each phase that ended: its name and its seconds.
    """

    def __init__(self, clock: Clock, on_end: Callable[[str, float], None]) -> None:
        self._clock, self._on_end = clock, on_end
        self._start_s = self._phase_start_s = clock.now_s()

    def end(self, name: str) -> None:
        """What was done since the last call was ``name``."""
        now_s = self._clock.now_s()
        duration_s, self._phase_start_s = now_s - self._phase_start_s, now_s
        self._on_end(name, duration_s)

    @property
    def total_s(self) -> float:
        """From the beginning to now."""
        return self._clock.now_s() - self._start_s
