"""What an ingress counts of a request."""

from __future__ import annotations

import re

import msgspec

from eagleray.core.acceptance import Acceptance
from eagleray.core.messages import TokenOutput
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.core.telemetry import Phase, TimeAccount
from eagleray.router.metrics import IngressMetrics


def account() -> TimeAccount:
    return TimeAccount.from_phases(
        dict.fromkeys(Phase, 0.1), total_s=0.5, time_to_first_token_s=0.2, num_prompt_tokens=100, num_cached_tokens=32,
        num_output_tokens=3, prefill_worker=None, decode_worker="d", attempts=1,
    )  # fmt: skip


def test_tokens_are_counted_by_type_and_observed_per_request_in_the_conventions_buckets() -> None:
    metrics = IngressMetrics("m")
    metrics.note_tokens(TokenOutput("a", 0, token_ids=(1, 2, 3), texts=("", "", "")))
    metrics.note_end(account(), "finished")
    text = metrics.text([], 0, 0, index_up=True)
    for kind, total in (("input", 100), ("input_cached", 32), ("output", 3)):
        assert f'eagleray_tokens_total{{gen_ai_request_model="m",type="{kind}"}} {total}.0' in text
    bounds = re.findall(r'gen_ai_client_token_usage_bucket\{.*type="output",le="([^"]+)"\} (\S+)', text)
    assert [float(bound) for bound, _ in bounds[:-1]] == [4.0**power for power in range(14)]
    assert [count for _, count in bounds[:3]] == ["0.0", "1.0", "1.0"]
    assert 'gen_ai_client_token_usage_sum{gen_ai_request_model="m",gen_ai_token_type="input"} 100.0' in text


ACCEPTANCE = Acceptance(
    num_steps=10, num_draft_tokens=24, num_accepted_tokens=12, drafts_per_position=(8, 8, 8),
    accepted_per_position=(7, 4, 1), verify_s=1.5, draft_s=0.25,
)  # fmt: skip


def test_what_came_of_guesses_adds_up_over_requests() -> None:
    metrics = IngressMetrics("m")
    for acceptance in (ACCEPTANCE, Acceptance(num_steps=5), None, ACCEPTANCE):
        metrics.note_end(msgspec.structs.replace(account(), acceptance=acceptance), "finished")
    text = metrics.text([], 0, 0, index_up=True)
    for name, total in (("steps", 25), ("drafts", 16), ("draft_tokens", 48), ("accepted_tokens", 24)):
        assert f'eagleray_spec_decode_{name}_total{{gen_ai_request_model="m"}} {total}.0' in text
    at_second = 'eagleray_spec_decode_accepted_tokens_per_position_total{gen_ai_request_model="m",position="1"}'
    assert f"{at_second} 8.0" in text
    assert 'eagleray_spec_decode_acceptance_length_sum{gen_ai_request_model="m"} 5.0' in text
    assert 'eagleray_spec_decode_acceptance_length_count{gen_ai_request_model="m"} 2.0' in text


def test_a_worker_that_guesses_shows_what_came_of_it_and_leaves_no_series_when_it_is_gone() -> None:
    metrics = IngressMetrics("m")
    guessing = WorkerSnapshot(worker_id="d", role=Role.DECODE, epoch=1, acceptance=ACCEPTANCE)
    text = metrics.text([guessing, WorkerSnapshot(worker_id="p", role=Role.PREFILL, epoch=1)], 0, 0, index_up=True)
    series = dict(re.findall(r"^eagleray_worker_spec_decode_(\w+\{[^}]*\}) (\S+)$", text, re.MULTILINE))
    of_worker = 'pool="decode",worker="d"'
    assert series[f"draft_tokens_total{{{of_worker}}}"] == "24.0"
    assert series['accepted_tokens_per_position_total{pool="decode",position="2",worker="d"}'] == "1.0"
    assert series[f"verify_seconds_total{{{of_worker}}}"] == "1.5"
    assert not any('worker="p"' in name for name in series)
    assert "worker_spec_decode_draft_tokens_total{" not in metrics.text([], 0, 0, index_up=True)
