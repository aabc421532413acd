"""The phase clock: whatever is marked and whatever workers claim, time is neither lost nor counted twice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.core.clock import ManualClock
from eagleray.core.telemetry import Phase, PhaseClock, TimeAccount

PHASES = st.sampled_from(list(Phase))
# Sixteenths of a second add up exactly in floating point, so that equality can be asserted.
SECONDS = st.integers(0, 200).map(lambda sixteenths: sixteenths / 16)
CLAIMS = st.one_of(SECONDS, SECONDS.map(lambda seconds: -seconds), st.just(float("inf")))
MARKS = st.lists(st.tuples(SECONDS, PHASES, st.dictionaries(PHASES, CLAIMS)))


def run_marks(marks: list[tuple[float, Phase, dict[Phase, float]]]) -> PhaseClock:
    clock = ManualClock(3.0)
    phases = PhaseClock(clock)
    for passed_s, rest, parts in marks:
        clock.advance(passed_s)
        phases.mark(rest, parts)
    return phases


@given(MARKS)
def test_segments_have_no_overlap_and_no_hole_and_add_up_to_the_time_elapsed(
    marks: list[tuple[float, Phase, dict[Phase, float]]],
) -> None:
    phases = run_marks(marks)
    elapsed_s = sum(passed_s for passed_s, _, _ in marks)
    assert phases.elapsed_s == elapsed_s
    segments = phases.segments()
    edges = [3.0, *(end_s for _, _, end_s in segments)]
    assert [start_s for _, start_s, _ in segments] == edges[:-1]
    assert edges[-1] == 3.0 + elapsed_s
    assert all(start_s < end_s for _, start_s, end_s in segments)
    assert sum(phases.spent_s().values()) == elapsed_s
    assert phases.spent_s().keys() == set(Phase)


@given(MARKS)
def test_neighbouring_segments_are_of_different_phases(marks: list[tuple[float, Phase, dict[Phase, float]]]) -> None:
    names = [phase for phase, _, _ in run_marks(marks).segments()]
    assert all(first is not second for first, second in itertools.pairwise(names))


def test_parts_come_first_in_their_order_and_the_rest_gets_what_they_leave() -> None:
    phases = run_marks([(10.0, Phase.NETWORK, {Phase.QUEUE: 2.0, Phase.PREFILL: 5.0})])
    assert phases.segments() == [
        (Phase.QUEUE, 3.0, 5.0),
        (Phase.PREFILL, 5.0, 10.0),
        (Phase.NETWORK, 10.0, 13.0),
    ]


def test_a_worker_that_claims_more_time_than_has_passed_gets_what_there_is() -> None:
    spent_s = run_marks([(4.0, Phase.NETWORK, {Phase.QUEUE: 3.0, Phase.PREFILL: 9.0})]).spent_s()
    assert (spent_s[Phase.QUEUE], spent_s[Phase.PREFILL], spent_s[Phase.NETWORK]) == (3.0, 1.0, 0.0)


def test_time_after_the_last_mark_belongs_to_nobody_yet() -> None:
    clock = ManualClock()
    phases = PhaseClock(clock)
    clock.advance(1.0)
    assert phases.elapsed_s == 0.0 and phases.segments() == []
    phases.mark(Phase.QUEUE)
    assert phases.elapsed_s == phases.spent_s()[Phase.QUEUE] == 1.0


def test_time_before_the_first_mark_counts_from_the_arrival() -> None:
    clock = ManualClock(10.0)
    phases = PhaseClock(clock, already_s=0.5)
    clock.advance(1.0)
    phases.mark(Phase.QUEUE)
    assert phases.segments() == [(Phase.QUEUE, 9.5, 11.0)]


def test_an_account_tells_the_phases_in_seconds() -> None:
    phases = run_marks([(1.0, Phase.QUEUE, {}), (2.0, Phase.PREFILL, {}), (4.0, Phase.DECODE, {})])
    account = TimeAccount.from_phases(
        phases.spent_s(), total_s=phases.elapsed_s, time_to_first_token_s=3.0, num_prompt_tokens=5,
        num_cached_tokens=4, num_output_tokens=9, prefill_worker=None, decode_worker="decode-1", attempts=1,
    )  # fmt: skip
    assert (account.queue_s, account.prefill_s, account.decode_s) == (1.0, 2.0, 4.0)
    assert (account.transfer_s, account.network_s, account.total_s) == (0.0, 0.0, 7.0)


def test_an_account_with_a_missing_or_misspelt_field_is_refused() -> None:
    with pytest.raises(Exception, match="total_s"):
        TimeAccount.from_phases(dict.fromkeys(Phase, 0.0), totals_s=1.0)
