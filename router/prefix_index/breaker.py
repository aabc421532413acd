"""A circuit breaker: stop asking a backend that keeps failing, and look now and then whether it is back."""

from __future__ import annotations

from eagleray.core.clock import Clock
from eagleray.router.prefix_index.index import IndexState


class CircuitBreaker:
    """Opens after ``failures_to_open`` failures in a row; then lets one probe through every ``reset_s`` seconds.

    A probe whose outcome is never reported (its caller was cancelled) is replaced by the next one.
    """

    def __init__(self, failures_to_open: int, reset_s: float, clock: Clock) -> None:
        self._failures_to_open = failures_to_open
        self._reset_s = reset_s
        self._clock = clock
        self._failures = 0  # in a row
        self._next_probe_s = 0.0
        self._state: IndexState = "up"
        self._since_s = clock.now_s()

    @property
    def state(self) -> IndexState:
        return self._state

    @property
    def state_since_s(self) -> float:
        return self._since_s

    def allows(self) -> bool:
        """Whether to ask now. While not up, a yes hands out the probe."""
        if self._state == "up":
            return True
        if self._clock.now_s() < self._next_probe_s:
            return False
        self._next_probe_s = self._clock.now_s() + self._reset_s
        self._enter("half_open")
        return True

    def succeeded(self) -> None:
        self._failures = 0
        self._enter("up")

    def failed(self) -> None:
        self._failures += 1
        if self._state == "half_open" or (self._state == "up" and self._failures >= self._failures_to_open):
            self._next_probe_s = self._clock.now_s() + self._reset_s
            self._enter("down")

    def _enter(self, state: IndexState) -> None:
        if state != self._state:
            self._state = state
            self._since_s = self._clock.now_s()
