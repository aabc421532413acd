"""OpenTelemetry spans of a request, made at its end from the same phase clock that the user's account comes from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind, Tracer, set_span_in_context

from eagleray.core.acceptance import Acceptance
from eagleray.core.request import RequestSpec
from eagleray.core.telemetry import Phase, PhaseClock, QueueParts, TimeAccount


class RequestTracer(Protocol):
    """Records finished requests."""

    def record(self, spec: RequestSpec, phases: PhaseClock, account: TimeAccount, outcome: str) -> None: ...

    def close(self) -> None:
        """Send what is still to be sent, or give up on it after a few seconds."""
        ...


class NoTracer:
    """Tracing is off."""

    def record(self, spec: RequestSpec, phases: PhaseClock, account: TimeAccount, outcome: str) -> None:
        return

    def close(self) -> None:
        return


class OpenTelemetryTracer:
    """A span per request and one per phase segment below it, under the caller's ``traceparent``. The GenAI conventions
    name the attributes (open-telemetry/semantic-conventions-genai); what they lack is under ``eagleray.``."""

    def __init__(self, tracer: Tracer, model_name: str, close: Callable[[], None]) -> None:
        """``close`` ends the provider that ``tracer`` is of."""
        self._tracer = tracer
        self._model_name = model_name
        self.close = close

    def record(self, spec: RequestSpec, phases: PhaseClock, account: TimeAccount, outcome: str) -> None:
        segments = phases.segments()
        if not segments:
            return
        # The phase clock is monotonic; its last mark is now, give or take the microseconds since.
        offset_s = time.time() - segments[-1][2]

        def at(moment_s: float) -> int:
            return int((moment_s + offset_s) * 1e9)

        parent = extract({"traceparent": spec.trace_parent}) if spec.trace_parent else None
        root = self._tracer.start_span(
            f"{spec.operation} {self._model_name}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=at(segments[0][1]),
            attributes={
                "gen_ai.operation.name": spec.operation,
                "gen_ai.provider.name": "eagleray",
                "gen_ai.request.model": self._model_name,
                "gen_ai.request.temperature": spec.sampling.temperature,
                "gen_ai.request.choice.count": spec.sampling.n,
                "gen_ai.usage.input_tokens": account.num_prompt_tokens,
                "gen_ai.usage.output_tokens": account.num_output_tokens,
                "gen_ai.usage.cache_read.input_tokens": account.num_cached_tokens,
                "eagleray.request_id": spec.request_id,
                "eagleray.outcome": outcome,
                "eagleray.attempts": account.attempts,
                "eagleray.prefill_worker": account.prefill_worker or "",
                "eagleray.decode_worker": account.decode_worker or "",
                "eagleray.route_reason": account.route_reason,
                **({} if account.queue is None else _queue_attributes(account.queue)),
            },
        )
        below = set_span_in_context(root)
        last_decode = max((place for place, (phase, *_) in enumerate(segments) if phase is Phase.DECODE), default=None)
        for place, (phase, start_s, end_s) in enumerate(segments):
            attributes = _acceptance_attributes(account.acceptance) if place == last_decode else {}
            span = self._tracer.start_span(
                f"eagleray.{phase.value}", context=below, start_time=at(start_s), attributes=attributes
            )
            span.end(at(end_s))
        root.end(at(segments[-1][2]))


def _queue_attributes(queue: QueueParts) -> dict[str, float]:
    """``eagleray.queue.read_s`` and so on."""
    return {f"eagleray.queue.{name}": seconds for name, seconds in msgspec.structs.asdict(queue).items()}


def _acceptance_attributes(acceptance: Acceptance | None) -> dict[str, int | float | Sequence[float]]:
    """Of the whole request. One that was continued elsewhere has several spans of decoding; the last of them tells."""
    if acceptance is None:
        return {}
    return {
        "eagleray.spec_decode.steps": acceptance.num_steps,
        "eagleray.spec_decode.draft_tokens": acceptance.num_draft_tokens,
        "eagleray.spec_decode.accepted_tokens": acceptance.num_accepted_tokens,
        "eagleray.spec_decode.acceptance_length": acceptance.acceptance_length,
        "eagleray.spec_decode.rate_per_position": acceptance.rate_per_position,
        "eagleray.spec_decode.verify_s": acceptance.verify_s,
        "eagleray.spec_decode.draft_s": acceptance.draft_s,
    }
