"""Where a request's time went: one closed set of phases and one clock that fills them.

The clock cuts the time since its last mark into parts that add up to it. So phases cannot overlap or leave a hole, and
their sum is the time between the first mark and the last, whatever the workers reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import msgspec

from eagleray.core.acceptance import Acceptance
from eagleray.core.clock import Clock


class Phase(str, Enum):
    QUEUE = "queue"  # in the ingress, read and then waiting for a worker, or on a worker waiting for its first step
    PREFILL = "prefill"  # computing known tokens up to the first new one
    TRANSFER = "transfer"  # after the first token: the decode worker waits for KV
    DECODE = "decode"
    NETWORK = "network"  # between ingress and workers: what no worker accounts for


class PhaseClock:
    """Attributes all time to phases. Not thread-safe: one request, one event loop.

    Args:
        already_s: since the request arrived; counting begins then.
    """

    def __init__(self, clock: Clock, already_s: float = 0.0) -> None:
        self._clock = clock
        self._start_s = self._mark_s = clock.now_s() - already_s
        self._segments: list[tuple[Phase, float]] = []  # (phase, its end), each from the end of the one before

    def mark(self, rest: Phase, parts: Mapping[Phase, float] | None = None) -> None:
        """Attribute the time since the last mark: to ``parts`` as far as it reaches, and what is left to ``rest``."""
        now_s = self._clock.now_s()
        for phase, claimed_s in (parts or {}).items():
            self._close(phase, min(self._mark_s + max(claimed_s, 0.0), now_s))
        self._close(rest, now_s)

    def _close(self, phase: Phase, end_s: float) -> None:
        if self._segments and self._segments[-1][0] is phase:
            self._segments[-1] = (phase, end_s)
        elif end_s > self._mark_s:
            self._segments.append((phase, end_s))
        self._mark_s = end_s

    @property
    def elapsed_s(self) -> float:
        """Time between the beginning and the last mark; equals the sum of all phases."""
        return self._mark_s - self._start_s

    def segments(self) -> list[tuple[Phase, float, float]]:
        """(phase, start, end) without overlap or hole, on this clock; neighbours of one phase are one segment."""
        starts = [self._start_s, *(end_s for _, end_s in self._segments)]
        return [(phase, start_s, end_s) for start_s, (phase, end_s) in zip(starts, self._segments, strict=False)]

    def spent_s(self) -> dict[Phase, float]:
        spent = dict.fromkeys(Phase, 0.0)
        for phase, start_s, end_s in self.segments():
            spent[phase] += end_s - start_s
        return spent


class QueueParts(msgspec.Struct, frozen=True, kw_only=True):
    """What ``queue_s`` is made of, over all attempts of the request's first choice. The parts sum to it, unless the
    request ends while another worker is asked to go on with it."""

    read_s: float  # in the ingress: the body read and checked, the template applied, tokenised
    route_s: float  # the rest: cached prefixes looked up, workers chosen and waited for, and some that were lost
    decode_accept_s: float  # from asking decode workers to their answers
    prefill_accept_s: float  # from asking prefill workers to their answers
    first_step_s: float  # on a worker that has accepted, until its first step


class TimeAccount(msgspec.Struct, frozen=True, kw_only=True):
    """What a user is told about one request, in seconds as the ingress measured them."""

    queue_s: float
    prefill_s: float
    transfer_s: float
    decode_s: float
    network_s: float
    total_s: float
    time_to_first_token_s: float | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    prefill_worker: str | None  # None: prefilled where it was decoded
    decode_worker: str | None
    attempts: int
    route_reason: str = ""
    queue: QueueParts | None = None
    acceptance: Acceptance | None = None  # over all attempts and choices; None: nobody guessed

    @classmethod
    def from_phases(cls, phases: Mapping[Phase, float], **rest: object) -> TimeAccount:
        spent = {f"{phase.value}_s": phases[phase] for phase in Phase}
        return msgspec.convert({**spent, **rest}, cls)
