"""Load in flight: counted once, from the routing decision until the worker's own snapshot shows it."""

from __future__ import annotations

from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.router.pending import Load, PendingLoad


def snapshot(number: int = 1, step_running_s: float = 0.0) -> WorkerSnapshot:
    return WorkerSnapshot(worker_id="w", role=Role.PREFILL, epoch=1, number=number, step_running_s=step_running_s)


def test_a_request_counts_from_the_decision_until_a_snapshot_after_its_acceptance() -> None:
    pending, before, after = PendingLoad(), snapshot(1), snapshot(2)
    pending.note_sent("w", "r", 10, 30)
    assert pending.on("w", before) == Load(1, 10, 30)
    pending.note_accepted("w", "r", before)
    assert pending.on("w", before) == Load(1, 10, 30)
    assert pending.on("w", snapshot(1, step_running_s=3.0)) == Load(1, 10, 30)  # said again in a long step
    assert pending.on("w", after) == Load()


def test_a_request_that_was_not_taken_counts_no_more() -> None:
    pending, newest = PendingLoad(), snapshot()
    pending.note_sent("w", "r", 10, 30)
    pending.note_sent("v", "r", 0, 30)
    pending.note_sent("w", "other", 5, 5)
    pending.forget("r")
    assert pending.on("w", newest) == Load(1, 5, 5)
    assert pending.on("v", newest) == Load()
