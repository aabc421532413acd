"""Where a request's time went, as spans: from a real request on real workers to what a collector receives."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from eagleray.cluster.exporters import build_tracer
from eagleray.cluster.local import LocalCluster
from eagleray.core.config import PoolConfig, TelemetryConfig, parse_config
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import Role
from eagleray.core.telemetry import Phase, TimeAccount
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.engine.scheduling.plan import StepPlan, StepResult
from eagleray.engine.speculation.controller import FixedDrafts
from eagleray.engine.speculation.tree import DraftShape
from eagleray.router.tracing import NoTracer, OpenTelemetryTracer, RequestTracer
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText

TOKENIZER = byte_tokenizer()
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACE_PARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
REQUEST_DEADLINE_S = 10.0
NANOSECONDS = 1e-9
PHASE_NAMES = {f"eagleray.{phase.value}" for phase in Phase}


VERIFY_S, DRAFT_S = 0.25, 0.125  # of each step, as it says


class TimedExecutor(FakeExecutor):
    def _run(self, plan: StepPlan) -> StepResult:
        return replace(super()._run(plan), verify_s=VERIFY_S, draft_s=DRAFT_S)


def new_executor(role: Role, pool: PoolConfig) -> FakeExecutor:
    return TimedExecutor(num_blocks=64, max_model_tokens=512, shared=True)


def new_spec(trace_parent: str = TRACE_PARENT, max_tokens: int = 20) -> RequestSpec:
    prompt = tuple(random.Random(1).choices(range(250), k=100))
    sampling = SamplingParams(max_tokens=max_tokens, seed=3, ignore_eos=True, temperature=0.5)
    return RequestSpec(
        request_id="a", token_ids=prompt, num_prompt_tokens=100, sampling=sampling, trace_parent=trace_parent
    )


async def accounts_of(
    tracer: RequestTracer, *specs: RequestSpec, hang_up_after: int | None = None, guessing: DraftShape | None = None
) -> list[TimeAccount]:
    """The accounts of requests served one after the other by a prefill and a decode worker under ``tracer``."""
    config = parse_config(
        {"prefill": {"replicas": 1}, "decode": {"replicas": 1}, "router": {"local_prefill_tokens": 8}}
    )
    accounts = []
    cluster = LocalCluster(
        config,
        new_executor,
        lambda spec: OutputText(TOKENIZER, spec.sampling, ()),
        new_draft_policy=None if guessing is None else lambda executor: FixedDrafts(guessing),
    )
    async with cluster:
        cluster.coordinator.tracer = tracer
        for spec in specs:
            generation = cluster.coordinator.generate(spec)
            async for output in generation:
                if output.position == hang_up_after:
                    break
            await generation.aclose()
            assert generation.account is not None
            accounts.append(generation.account)
    return accounts


@pytest.fixture
def exported() -> Iterator[tuple[RequestTracer, InMemorySpanExporter]]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = OpenTelemetryTracer(provider.get_tracer("test"), "fake-model", provider.shutdown)
    yield tracer, exporter
    tracer.close()


def split(spans: tuple[ReadableSpan, ...]) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """The request's span, and those of its phases in order of time."""
    [root] = [span for span in spans if span.kind is SpanKind.SERVER]
    phases = [span for span in spans if span is not root]
    return root, sorted(phases, key=lambda span: span.start_time or 0)


Exported = tuple[RequestTracer, InMemorySpanExporter]


async def test_phases_are_children_of_the_request_without_overlap_or_hole_and_sum_to_it(exported: Exported) -> None:
    tracer, exporter = exported
    [account] = await accounts_of(tracer, new_spec())
    root, phases = split(exporter.get_finished_spans())
    assert root.context is not None
    assert {phase.parent.span_id for phase in phases if phase.parent} == {root.context.span_id}
    assert {phase.context.trace_id for phase in phases if phase.context} == {root.context.trace_id}
    edges = [root.start_time, *(phase.end_time for phase in phases)]
    assert [phase.start_time for phase in phases] == edges[:-1]
    assert edges[-1] == root.end_time
    assert root.start_time is not None and root.end_time is not None
    assert (root.end_time - root.start_time) * NANOSECONDS == pytest.approx(account.total_s, abs=1e-6)
    assert {phase.name for phase in phases} <= PHASE_NAMES
    assert "eagleray.decode" in {phase.name for phase in phases}


async def test_the_spans_tell_the_same_times_as_the_users_account(exported: Exported) -> None:
    tracer, exporter = exported
    [account] = await accounts_of(tracer, new_spec())
    _, phases = split(exporter.get_finished_spans())
    spent_s = dict.fromkeys(PHASE_NAMES, 0.0)
    for span in phases:
        assert span.start_time is not None and span.end_time is not None
        spent_s[span.name] += (span.end_time - span.start_time) * NANOSECONDS
    told_s = {f"eagleray.{phase.value}": getattr(account, f"{phase.value}_s") for phase in Phase}
    assert spent_s == pytest.approx(told_s, abs=1e-5)


async def test_the_callers_traceparent_is_the_parent(exported: Exported) -> None:
    tracer, exporter = exported
    await accounts_of(tracer, new_spec())
    root, _ = split(exporter.get_finished_spans())
    assert root.context is not None and root.parent is not None
    assert f"{root.context.trace_id:032x}" == TRACE_ID
    assert f"{root.parent.span_id:016x}" == PARENT_ID


@pytest.mark.parametrize("trace_parent", ["", "nonsense", "00-0-0-00"])
async def test_without_a_proper_traceparent_a_new_trace_begins(exported: Exported, trace_parent: str) -> None:
    tracer, exporter = exported
    await accounts_of(tracer, new_spec(trace_parent))
    root, _ = split(exporter.get_finished_spans())
    assert root.parent is None


async def test_the_request_is_described_under_the_conventions_names(exported: Exported) -> None:
    tracer, exporter = exported
    [account] = await accounts_of(tracer, new_spec())
    root, _ = split(exporter.get_finished_spans())
    assert root.name == "text_completion fake-model"
    assert root.attributes is not None
    described = dict(root.attributes)
    assert described["gen_ai.request.model"] == "fake-model"
    assert described["gen_ai.operation.name"] == "text_completion"
    assert described["gen_ai.request.temperature"] == 0.5
    assert (described["gen_ai.usage.input_tokens"], described["gen_ai.usage.output_tokens"]) == (100, 20)
    assert (described["eagleray.request_id"], described["eagleray.outcome"]) == ("a", "finished")
    assert described["eagleray.prefill_worker"] == account.prefill_worker
    assert described["eagleray.decode_worker"] == account.decode_worker
    parts_s = [seconds for name, seconds in described.items() if name.startswith("eagleray.queue.")]
    assert len(parts_s) == 5 and sum(parts_s) == pytest.approx(account.queue_s)  # type: ignore[arg-type]


async def test_the_span_of_decoding_tells_what_came_of_guesses(exported: Exported) -> None:
    tracer, exporter = exported
    [account] = await accounts_of(tracer, new_spec(), guessing=DraftShape(3))
    told = account.acceptance
    assert told is not None and told.num_accepted_tokens > 0
    assert (
        1 + told.num_steps + told.num_accepted_tokens >= account.num_output_tokens
    )  # the last step may bring too many
    _, phases = split(exporter.get_finished_spans())
    [attributes] = [dict(span.attributes) for span in phases if span.attributes]
    assert {span.name for span in phases if span.attributes} == {"eagleray.decode"}
    assert attributes == {
        "eagleray.spec_decode.steps": told.num_steps,
        "eagleray.spec_decode.draft_tokens": told.num_draft_tokens,
        "eagleray.spec_decode.accepted_tokens": told.num_accepted_tokens,
        "eagleray.spec_decode.acceptance_length": told.acceptance_length,
        "eagleray.spec_decode.rate_per_position": told.rate_per_position,
        "eagleray.spec_decode.verify_s": VERIFY_S * told.num_steps,
        "eagleray.spec_decode.draft_s": DRAFT_S * told.num_steps,
    }
    assert told.acceptance_length > 1.0 and len(told.rate_per_position) == 3


async def test_without_guesses_spans_say_nothing_of_them(exported: Exported) -> None:
    tracer, exporter = exported
    [account] = await accounts_of(tracer, new_spec())
    _, phases = split(exporter.get_finished_spans())
    assert account.acceptance is None and not any(span.attributes for span in phases)


async def test_a_request_that_is_hung_up_on_has_a_trace_that_says_so(exported: Exported) -> None:
    tracer, exporter = exported
    await accounts_of(tracer, new_spec(max_tokens=800), hang_up_after=1)
    root, phases = split(exporter.get_finished_spans())
    assert root.attributes is not None and root.attributes["eagleray.outcome"] == "aborted"
    assert phases[-1].end_time == root.end_time


# ---- over the wire

COLLECTOR = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(self, request, context):
        for resource in request.resource_spans:
            service = {entry.key: entry.value.string_value for entry in resource.resource.attributes}["service.name"]
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                told = {"service": service, "name": span.name, "trace": span.trace_id.hex(), "id": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(), "start": span.start_time_unix_nano,
                        "end": span.end_time_unix_nano}
                print(json.dumps(told), flush=True)
        return trace_service_pb2.ExportTraceServiceResponse()

server = grpc.server(ThreadPoolExecutor(1))
trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
sys.stdin.read()  # until the test has gone
server.stop(None)
"""


@contextmanager
def collector() -> Iterator[subprocess.Popen[str]]:
    """A process that prints the port it listens on, then each span that it receives."""
    run = [sys.executable, "-c", COLLECTOR]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 30)


async def test_a_collector_in_another_process_has_all_spans_over_otlp_when_the_tracer_is_closed() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
    with collector() as process:
        endpoint = f"http://127.0.0.1:{int(await next_line(process))}"
        tracer = build_tracer(TelemetryConfig(otlp_endpoint=endpoint, service_name="eagleray-test"), "fake-model")
        [account] = await accounts_of(tracer, new_spec())
        await asyncio.to_thread(tracer.close)  # at once: by itself the SDK sends every five seconds
        spans = [json.loads(await next_line(process))]
        while spans[-1]["name"] != "text_completion fake-model":  # a request's own span ends last
            spans.append(json.loads(await next_line(process)))
    root, phases = spans[-1], spans[:-1]
    assert (root["service"], root["trace"], root["parent"]) == ("eagleray-test", TRACE_ID, PARENT_ID)
    assert {(phase["trace"], phase["parent"]) for phase in phases} == {(TRACE_ID, root["id"])}
    assert [phase["start"] for phase in phases] == [root["start"], *(phase["end"] for phase in phases[:-1])]
    assert phases[-1]["end"] == root["end"]
    assert (root["end"] - root["start"]) * NANOSECONDS == pytest.approx(account.total_s, abs=1e-6)


def test_without_an_endpoint_nothing_is_exported() -> None:
    assert isinstance(build_tracer(TelemetryConfig(), "fake-model"), NoTracer)


async def test_a_collector_that_accepts_and_never_answers_delays_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten requests end while the first export still waits for its answer."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(REQUEST_DEADLINE_S)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracer = build_tracer(TelemetryConfig(otlp_endpoint=endpoint), "fake-model")
        requests = accounts_of(tracer, *[new_spec()] * 10)
        accounts = await asyncio.wait_for(requests, REQUEST_DEADLINE_S)
        connection, _ = await asyncio.to_thread(silent.accept)  # it was tried
        connection.close()
    await asyncio.wait_for(asyncio.to_thread(tracer.close), REQUEST_DEADLINE_S)
    assert [account.num_output_tokens for account in accounts] == [20] * 10
