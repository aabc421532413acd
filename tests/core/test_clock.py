"""The two clocks keep the contract of the protocol."""

from __future__ import annotations

import pytest

from eagleray.core.clock import ManualClock, SystemClock


def test_a_manual_clock_stands_until_it_is_moved() -> None:
    clock = ManualClock(5.0)
    assert clock.now_s() == clock.now_s() == 5.0
    clock.advance(0.25)
    clock.advance(0.0)
    assert clock.now_s() == 5.25


def test_a_manual_clock_refuses_to_go_back() -> None:
    clock = ManualClock()
    with pytest.raises(ValueError, match=r"advance\(-1\)"):
        clock.advance(-1)
    assert clock.now_s() == 0.0


def test_the_systems_clock_never_goes_back() -> None:
    clock = SystemClock()
    readings = [clock.now_s() for _ in range(1000)]
    assert readings == sorted(readings)
