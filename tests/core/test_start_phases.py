from __future__ import annotations

from eagleray.core.clock import ManualClock
from eagleray.core.start_phases import StartPhases


def test_phases_follow_each_other_and_add_up() -> None:
    clock, ended = ManualClock(), []
    phases = StartPhases(clock, lambda name, duration_s: ended.append((name, duration_s)))
    for name, duration_s in (("import", 2.0), ("weights", 0.5), ("channel", 0.0)):
        clock.advance(duration_s)
        phases.end(name)
    assert ended == [("import", 2.0), ("weights", 0.5), ("channel", 0.0)]
    assert phases.total_s == 2.5
