from __future__ import annotations

import pytest
from load import Answer, Outcome, PromptTokensDetails, Usage
from measure import distribution, percentile, report
from report import sections, to_markdown
from workload import Limits, Scaling, ScheduledRequest, Workload


def timing(**given: object) -> dict[str, object]:
    phases = dict.fromkeys(("queue_s", "prefill_s", "transfer_s", "decode_s", "network_s"), 0.1)
    rest = {"total_s": 0.5, "prefill_worker": "prefill-0", "decode_worker": "decode-0", "attempts": 1}
    return {**phases, **rest, **given}


def answered(request: ScheduledRequest, sent_s: float, *chunks_s: float, cached: int = 0, **account: object) -> Outcome:
    usage = Usage(request.num_prompt_tokens, request.num_output_tokens, PromptTokensDetails(cached))
    end_s = chunks_s[-1] + 0.1
    return Outcome(request, sent_s, Answer(sent_s, chunks_s, end_s, usage, timing(**account)))


FIRST = ScheduledRequest(0.0, 64, 3, (0, 1))
SECOND = ScheduledRequest(0.0, 64, 1, (0, 1))
THIRD = ScheduledRequest(4.0, 32, 3, (0,))
WORKLOAD = Workload((FIRST, SECOND, THIRD), Scaling(32), Limits(2048, 16, (128, 255)))
OUTCOMES = [
    answered(FIRST, 0.0, 1.0, 1.2, 1.8),
    answered(SECOND, 0.5, 1.5, cached=32, prefill_worker=None, attempts=2),
    Outcome(THIRD, 4.0, error="HTTP 429 overloaded"),
]


def test_percentiles_interpolate_between_neighbours():
    assert [percentile([1.0, 2.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 1.5, 2.0, 3.0, 4.0]


def test_nothing_measured_is_none():
    assert distribution([]) is None


def test_latencies_are_measured_from_sending_over_whole_answers():
    latencies = report(OUTCOMES, WORKLOAD).latencies_s
    assert latencies.time_to_first_token.mean == pytest.approx(1.0)
    assert latencies.time_per_output_token.mean == pytest.approx(0.4)  # of the first: 0.8 s for two more tokens
    assert latencies.inter_token_latency.p50 == pytest.approx(0.4)  # of 0.2 and 0.6
    assert latencies.end_to_end.mean == pytest.approx((1.9 + 1.1) / 2)
    assert latencies.send_delay.mean == pytest.approx(0.5 / 3)


def test_throughput_counts_whole_answers_until_the_last_of_them():
    throughput = report(OUTCOMES, WORKLOAD).throughput
    assert throughput.duration_s == pytest.approx(1.9)
    assert (throughput.prompt_tokens, throughput.output_tokens) == (128, 4)
    assert throughput.requests_per_s == pytest.approx(2 / 1.9)
    assert throughput.requests_per_s_asked == pytest.approx(3 / 4)


def test_errors_are_counted_by_kind():
    result = report(OUTCOMES, WORKLOAD)
    assert (result.num_requests, result.num_completed, result.errors) == (3, 2, {"HTTP 429 overloaded": 1})


def test_measured_prefix_hits_stand_beside_the_ideal_of_the_same_answers():
    hits = report(OUTCOMES, WORKLOAD).prefix_hits
    assert (hits.measured, hits.ideal, hits.ideal_unrounded) == (32 / 128, 48 / 128, 64 / 128)


def test_phases_add_up_to_the_mean_latency():
    result = report(OUTCOMES, WORKLOAD)
    assert sum(result.phases_mean_s.values()) == pytest.approx(result.latencies_s.end_to_end.mean)


def test_requests_are_counted_per_worker():
    routing = report(OUTCOMES, WORKLOAD).routing
    assert (routing.prefill, routing.decode) == ({"prefill-0": 1}, {"decode-0": 2})
    assert (routing.local_prefills, routing.retried) == (1, 1)


def test_a_run_in_which_nothing_was_answered_is_still_a_report():
    result = report([Outcome(FIRST, error="unfinished")], Workload((FIRST,), Scaling(32), WORKLOAD.limits))
    assert (result.num_completed, result.errors, result.prefix_hits) == (0, {"unfinished": 1}, None)
    assert "| unfinished | 1 |" in to_markdown(sections(result, WORKLOAD))


def test_markdown_tables_have_a_rule_and_equal_columns():
    for table in to_markdown(sections(report(OUTCOMES, WORKLOAD), WORKLOAD)).split("\n\n"):
        lines = table.splitlines()
        assert set(lines[1]) <= set("|-: ")
        assert len({line.count("|") for line in lines}) == 1
