from __future__ import annotations

from eagleray.core.clock import ManualClock
from eagleray.router.prefix_index.breaker import CircuitBreaker


def opened(clock: ManualClock) -> CircuitBreaker:
    breaker = CircuitBreaker(failures_to_open=3, reset_s=1.0, clock=clock)
    for _ in range(3):
        assert breaker.allows()
        breaker.failed()
    return breaker


def test_it_opens_after_that_many_failures_in_a_row() -> None:
    breaker = CircuitBreaker(failures_to_open=3, reset_s=1.0, clock=ManualClock())
    for outcome in (breaker.failed, breaker.failed, breaker.succeeded, breaker.failed, breaker.failed):
        outcome()
    assert breaker.state == "up" and breaker.allows()
    breaker.failed()
    assert breaker.state == "down" and not breaker.allows()


def test_one_probe_goes_through_after_the_reset_time() -> None:
    clock = ManualClock(5.0)
    breaker = opened(clock)
    clock.advance(0.99)
    assert not breaker.allows()
    clock.advance(0.01)
    assert breaker.allows() and breaker.state == "half_open"
    assert not breaker.allows()


def test_a_probe_that_succeeds_closes_it_and_one_that_fails_opens_it_again() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    clock.advance(1.0)
    breaker.allows()
    breaker.failed()
    assert breaker.state == "down" and not breaker.allows()
    clock.advance(1.0)
    assert breaker.allows()
    breaker.succeeded()
    assert breaker.state == "up" and breaker.state_since_s == 2.0


def test_a_probe_that_is_never_heard_of_again_is_replaced() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    clock.advance(1.0)
    assert breaker.allows()
    clock.advance(1.0)
    assert breaker.allows()


def test_late_failures_of_earlier_calls_do_not_put_off_the_probe() -> None:
    clock = ManualClock()
    breaker = opened(clock)
    clock.advance(0.9)
    breaker.failed()
    clock.advance(0.1)
    assert breaker.allows()
