"""What one ingress counts, in the Prometheus text format, under the GenAI names of OpenTelemetry where there is one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from eagleray.core.messages import TokenOutput
from eagleray.core.snapshot import WorkerSnapshot
from eagleray.core.telemetry import TimeAccount
from eagleray.router.speculation_metrics import SpeculationMetrics

# The buckets that the GenAI conventions name for time per output token, carried on for the longer ones.
_SECONDS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_TOKENS: Final = tuple(4**power for power in range(14))  # as the conventions have them: 1, 4, 16, ... 67108864
_PHASES: Final = ("queue", "prefill", "transfer", "decode", "network")
_WORKER_GAUGES: Final = (
    "num_waiting", "num_running", "num_reserved", "num_handed_over", "uncomputed_tokens", "step_running_s",
    "blocks_total", "blocks_free", "blocks_cached", "decode_step_s", "prefill_tokens_per_s", "num_preemptions",
    "cached_tokens_total", "prompt_tokens_total", "output_tokens_total", "transfer_bytes_total",
    "transfer_bytes_per_s", "transfer_failures_total",
)  # fmt: skip


class IngressMetrics:
    """One registry per ingress, passed in: two of them in one process do not meet."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        labels = {"gen_ai_request_model": model_name}
        self._labels = labels
        names = tuple(labels)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, names, buckets=_SECONDS, registry=self._registry).labels(**labels)

        self._first_token = histogram("gen_ai_server_time_to_first_token_seconds", "Request received to first token")
        self._per_token = histogram(
            "gen_ai_server_time_per_output_token_seconds", "Mean time of a token after the first"
        )
        self._duration = histogram("gen_ai_server_request_duration_seconds", "Request received to last token")
        self._usage = Histogram(
            "gen_ai_client_token_usage", "Tokens of a request", (*names, "gen_ai_token_type"), buckets=_TOKENS,
            registry=self._registry,
        )  # fmt: skip
        self._tokens = Counter("eagleray_tokens", "Tokens", (*names, "type"), registry=self._registry)
        self._output_tokens = self._tokens.labels(**labels, type="output")
        self._phases = Counter("eagleray_phase_seconds", "Time spent", (*names, "phase"), registry=self._registry)
        self._requests = Counter("eagleray_requests", "Requests ended", (*names, "outcome"), registry=self._registry)
        self._resumed = Counter(
            "eagleray_requests_resumed", "Requests continued on another worker", registry=self._registry
        )
        self._queued = Gauge("eagleray_ingress_queued_requests", "Waiting for a worker", registry=self._registry)
        self._running = Gauge("eagleray_ingress_running_requests", "On a worker", registry=self._registry)
        self._index_up = Gauge("eagleray_prefix_index_up", "1 while the prefix index answers", registry=self._registry)
        self._workers = {
            name: Gauge(
                f"eagleray_worker_{name}",
                "From the worker's last snapshot",
                ("worker", "pool"),
                registry=self._registry,
            )
            for name in _WORKER_GAUGES
        }
        self._speculation = SpeculationMetrics(self._registry, labels)

    def note_tokens(self, output: TokenOutput) -> None:
        self._output_tokens.inc(len(output.token_ids))

    def note_resumed(self) -> None:
        self._resumed.inc()

    def note_end(self, account: TimeAccount, outcome: str) -> None:
        self._requests.labels(**self._labels, outcome=outcome).inc()
        self._tokens.labels(**self._labels, type="input").inc(account.num_prompt_tokens)
        self._tokens.labels(**self._labels, type="input_cached").inc(account.num_cached_tokens)
        self._usage.labels(**self._labels, gen_ai_token_type="input").observe(account.num_prompt_tokens)
        self._usage.labels(**self._labels, gen_ai_token_type="output").observe(account.num_output_tokens)
        for phase in _PHASES:
            self._phases.labels(**self._labels, phase=phase).inc(getattr(account, f"{phase}_s"))
        self._duration.observe(account.total_s)
        if account.acceptance is not None:
            self._speculation.note_end(account.acceptance)
        if account.time_to_first_token_s is not None:
            self._first_token.observe(account.time_to_first_token_s)
            if account.num_output_tokens > 1:
                after_first_s = account.total_s - account.time_to_first_token_s
                self._per_token.observe(after_first_s / (account.num_output_tokens - 1))

    def text(self, snapshots: Collection[WorkerSnapshot], num_queued: int, num_running: int, index_up: bool) -> str:
        """The exposition, with gauges as of now; a worker that is gone leaves no series."""
        for gauge in self._workers.values():
            gauge.clear()
        for snapshot in snapshots:
            for name, gauge in self._workers.items():
                gauge.labels(worker=snapshot.worker_id, pool=snapshot.role.value).set(getattr(snapshot, name))
        self._speculation.show_workers(snapshots)
        self._queued.set(num_queued)
        self._running.set(num_running)
        self._index_up.set(index_up)
        return generate_latest(self._registry).decode()
