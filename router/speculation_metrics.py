"""What came of guessing tokens ahead, in the Prometheus text format. The counts, and positions from 0, are those that
vLLM exposes as ``vllm:spec_decode_*``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from eagleray.core.acceptance import Acceptance
from eagleray.core.snapshot import WorkerSnapshot

_TEXTS: Final[Mapping[str, str]] = {
    "steps": "Decoding steps of requests",
    "drafts": "Decoding steps of requests that verified guesses",
    "draft_tokens": "Guesses that were verified",
    "accepted_tokens": "Guesses that came true",
}
_POSITION_TEXTS: Final[Mapping[str, str]] = {
    "drafts_per_position": "Drafts that had a guess so far ahead",
    "accepted_tokens_per_position": "Guesses so far ahead that came true",
}
_SECONDS_TEXTS: Final[Mapping[str, str]] = {"verify": "Verifying", "draft": "Guessing"}
_LENGTHS: Final = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)
_WORKER_LABELS: Final = ("worker", "pool")


class SpeculationMetrics:
    """Counters of the requests that have ended, and gauges of what workers say of themselves."""

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str]) -> None:
        names = tuple(labels)
        self._labels = labels
        self._counts = {
            name: Counter(f"eagleray_spec_decode_{name}", text, names, registry=registry)
            for name, text in _TEXTS.items()
        }
        self._per_position = {
            name: Counter(f"eagleray_spec_decode_{name}", text, (*names, "position"), registry=registry)
            for name, text in _POSITION_TEXTS.items()
        }
        self._length = Histogram(
            "eagleray_spec_decode_acceptance_length", "A request's mean tokens per step that verified guesses", names,
            buckets=_LENGTHS, registry=registry,
        )  # fmt: skip
        self._worker_counts = _gauges(registry, "{}_total", _TEXTS, _WORKER_LABELS)
        self._worker_per_position = _gauges(registry, "{}_total", _POSITION_TEXTS, (*_WORKER_LABELS, "position"))
        self._worker_seconds = _gauges(registry, "{}_seconds_total", _SECONDS_TEXTS, _WORKER_LABELS)

    def note_end(self, acceptance: Acceptance) -> None:
        """A request has ended."""
        for name, count in _counts_of(acceptance).items():
            self._counts[name].labels(**self._labels).inc(count)
        for name, counts in _counts_per_position(acceptance).items():
            for position, count in enumerate(counts):
                self._per_position[name].labels(**self._labels, position=str(position)).inc(count)
        if acceptance.num_drafts:
            self._length.labels(**self._labels).observe(acceptance.acceptance_length)

    def show_workers(self, snapshots: Iterable[WorkerSnapshot]) -> None:
        """Set the gauges; a worker that is gone leaves no series."""
        for gauges in (self._worker_counts, self._worker_per_position, self._worker_seconds):
            for gauge in gauges.values():
                gauge.clear()
        for snapshot in snapshots:
            if snapshot.acceptance is not None:
                self._show(snapshot.acceptance, {"worker": snapshot.worker_id, "pool": snapshot.role.value})

    def _show(self, acceptance: Acceptance, labels: Mapping[str, str]) -> None:
        for name, count in _counts_of(acceptance).items():
            self._worker_counts[name].labels(**labels).set(count)
        for name, counts in _counts_per_position(acceptance).items():
            for position, count in enumerate(counts):
                self._worker_per_position[name].labels(**labels, position=str(position)).set(count)
        self._worker_seconds["verify"].labels(**labels).set(acceptance.verify_s)
        self._worker_seconds["draft"].labels(**labels).set(acceptance.draft_s)


def _gauges(
    registry: CollectorRegistry, pattern: str, texts: Mapping[str, str], labels: tuple[str, ...]
) -> dict[str, Gauge]:
    return {
        name: Gauge(f"eagleray_worker_spec_decode_{pattern.format(name)}", text, labels, registry=registry)
        for name, text in texts.items()
    }


def _counts_of(acceptance: Acceptance) -> dict[str, int]:
    return {
        "steps": acceptance.num_steps,
        "drafts": acceptance.num_drafts,
        "draft_tokens": acceptance.num_draft_tokens,
        "accepted_tokens": acceptance.num_accepted_tokens,
    }


def _counts_per_position(acceptance: Acceptance) -> dict[str, tuple[int, ...]]:
    return {
        "drafts_per_position": acceptance.drafts_per_position,
        "accepted_tokens_per_position": acceptance.accepted_per_position,
    }
