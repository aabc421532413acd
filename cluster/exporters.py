"""Where telemetry goes: OTLP when an endpoint is configured, nowhere otherwise."""

from __future__ import annotations

from typing import Final

from eagleray.core.config import TelemetryConfig
from eagleray.core.errors import ConfigError
from eagleray.router.tracing import NoTracer, OpenTelemetryTracer, RequestTracer

# A dead collector must cost nothing but spans: exports give up early and the queue drops what it cannot hold.
EXPORT_TIMEOUT_S: Final = 2
MAX_QUEUED_SPANS: Final = 8192


def build_tracer(config: TelemetryConfig, model_name: str) -> RequestTracer:
    """Raises ``ConfigError`` when an endpoint is set and the exporter is not installed."""
    if config.otlp_endpoint is None:
        return NoTracer()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            "telemetry.otlp_endpoint", config.otlp_endpoint, "needs the exporter: pip install 'eagleray[otlp]'"
        ) from None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": config.service_name}))
    exporter = OTLPSpanExporter(endpoint=config.otlp_endpoint, timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MAX_QUEUED_SPANS))
    return OpenTelemetryTracer(provider.get_tracer("eagleray"), model_name, provider.shutdown)
