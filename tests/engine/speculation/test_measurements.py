"""What the controller makes of what it has measured."""

from __future__ import annotations

import pytest

from eagleray.engine.speculation.measurements import FirstTimes


def test_trials_pay_for_the_first_times_that_they_cause_and_for_no_others() -> None:
    first_times = FirstTimes()
    for is_trial in (False, True, False, True):
        first_times.note(0.008, step_s=0.002, is_trial=is_trial)
    assert first_times.is_paid_for(2, paid_s=0.0321)  # two were a trial's, two more come
    assert not first_times.is_paid_for(2, paid_s=0.0319)


def test_what_causes_none_is_always_paid_for() -> None:
    first_times = FirstTimes()
    for _ in range(10):
        first_times.note(0.008, step_s=0.002, is_trial=True)
    assert first_times.is_paid_for(0, paid_s=0.0) and not first_times.is_paid_for(1, paid_s=0.08)


def test_a_pause_of_the_machine_is_no_first_time() -> None:
    first_times = FirstTimes()
    first_times.note(30.0, step_s=0.002, is_trial=True)
    assert first_times.is_paid_for(1, paid_s=0.0161)  # each counts as four steps


@pytest.mark.parametrize("beyond_s", [0.0, -0.001])
def test_first_times_that_take_no_longer_than_others_cost_nothing(beyond_s: float) -> None:
    first_times = FirstTimes()
    first_times.note(beyond_s, step_s=0.002, is_trial=True)
    assert first_times.is_paid_for(100, paid_s=0.0)
