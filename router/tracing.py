"""OpenTelemetry spans of a request, made at its end from the same phase clock that the user's account comes from."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind, Tracer, set_span_in_context

from eagleray.core.request import RequestSpec
from eagleray.core.telemetry import PhaseClock, TimeAccount


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
            },
        )
        below = set_span_in_context(root)
        for phase, start_s, end_s in segments:
            self._tracer.start_span(f"eagleray.{phase.value}", context=below, start_time=at(start_s)).end(at(end_s))
        root.end(at(segments[-1][2]))
