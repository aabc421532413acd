"""What an ingress counts of a request."""

from __future__ import annotations

import re

from eagleray.core.messages import TokenOutput
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
