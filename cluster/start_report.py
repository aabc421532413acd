"""What a start says while it goes on: each phase with its seconds, for users and for the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from eagleray.cluster.progress import PROCESS_PHASE, KernelsChosen, Note, PhaseEnded
from eagleray.core.clock import Clock
from eagleray.core.start_phases import StartPhases

LAST_PHASE: Final = "channel"  # of a worker: then it can be connected to

logger = logging.getLogger("eagleray")


class StartReport:
    """The service's own phases (``phases``), and those of its workers as they are heard."""

    def __init__(self, clock: Clock, on_progress: Callable[[str], None]) -> None:
        self._clock, self._on_progress = clock, on_progress
        self.phases = StartPhases(clock, self._own_phase_ended)
        self._deploying_since_s = clock.now_s()
        self._workers: dict[str, list[str]] = {}  # what each worker has said of its phases

    def heard(self, note: Note) -> None:
        """A worker's note. All its phases become one line when it is done."""
        if isinstance(note, KernelsChosen):
            self._on_progress(f"{note.worker} computes with {note.description}")
            return
        if not isinstance(note, PhaseEnded):
            self._on_progress(f"{note.worker}: {note.loaded} of {note.total} tensors loaded")
            return
        duration_s = note.duration_s
        if note.phase == PROCESS_PHASE:
            duration_s = self._clock.now_s() - self._deploying_since_s
        logger.info("start of %s, %s: %.2f s", note.worker, note.phase, duration_s)
        told = self._workers.setdefault(note.worker, [])
        told.append(f"{note.phase} {duration_s:.2f} s")
        if note.phase == LAST_PHASE:
            self._on_progress(f"{note.worker}: {', '.join(told)}")

    def _own_phase_ended(self, phase: str, duration_s: float) -> None:
        self._deploying_since_s = self._clock.now_s()
        logger.info("start, %s: %.2f s", phase, duration_s)
        self._on_progress(f"{phase}: {duration_s:.2f} s")
