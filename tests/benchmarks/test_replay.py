"""The command and its sender, against the real HTTP front over a fake service."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import httpx
import pytest
from load import LoadOptions, ServedModel, ServerError, ask_server, replay
from load_run import Run, run_load
from mooncake import TraceRequest, generate_trace
from replay import parse_options
from workload import Limits, build_workload

from eagleray.core.errors import Overloaded
from eagleray.router.fake_service import FakeGenerationService

FAST = ("--speedup", "1000", "--cache-salt", "salt")
ROWS = [
    TraceRequest(index, 600 + index, 30 + index, (0, index + 1))  # all fit, so none is scaled
    for index in range(6)
]
# An answer of another server to 9 prompt tokens and two of output.
STREAM = """data: {"choices":[{"text":"a"}]}

data: {"choices":[{"text":"b"}],"usage":null}

data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}

data: [DONE]

"""


async def replayed(url: str, *arguments: str, rows: list[TraceRequest] = ROWS) -> Run:
    return await run_load(parse_options(["--url", url, *FAST, *arguments]), rows)


async def test_the_command_replays_ten_requests_and_writes_everything_down(
    server_url: str, service: FakeGenerationService, replay_script: Path, tmp_path: Path
):
    service.script.num_cached_tokens = 16
    process = await asyncio.create_subprocess_exec(
        sys.executable, replay_script, "--url", server_url, "--requests", "10", "--seed", "4", "--speedup", "100",
        "--json", tmp_path / "result.json", "--markdown", stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        printed, _ = await process.communicate()
    written = json.loads((tmp_path / "result.json").read_bytes())
    report, scaling = written["report"], written["scaling"]
    num_prompt_tokens = sum(spec.num_prompt_tokens for spec in service.specs)

    assert process.returncode == 0
    assert "| completed | 10 of 10 |" in printed.decode()
    assert (report["num_requests"], report["num_completed"], report["errors"]) == (10, 10, {})
    assert report["throughput"]["prompt_tokens"] == num_prompt_tokens
    assert report["throughput"]["output_tokens"] == sum(spec.sampling.max_tokens for spec in service.specs)
    assert report["prefix_hits"]["measured"] == pytest.approx(160 / num_prompt_tokens)
    assert report["routing"]["prefill"] == {"prefill-0": 10}
    assert report["phases_mean_s"]["prefill"] == pytest.approx(0.01)
    assert scaling["block_tokens"] % 16 == 0 and scaling["factor"] == scaling["block_tokens"] / 512
    assert written["server"]["name"] == "fish" and written["server"]["max_model_tokens"] == 1024
    assert written["provenance"]["num_cores"] >= 1 and "--seed 4" in written["provenance"]["command"]
    assert [row["cached_tokens"] for row in written["requests"]] == [16] * 10


async def test_the_server_gets_the_prompts_and_lengths_of_the_trace(server_url: str, service: FakeGenerationService):
    run = await replayed(server_url)
    sent = {(spec.token_ids, spec.sampling.max_tokens) for spec in service.specs}
    assert sent == {
        (tuple(run.workload.token_ids(request)), request.num_output_tokens) for request in run.workload.requests
    }
    assert all(spec.sampling.ignore_eos and spec.sampling.is_greedy for spec in service.specs)
    assert {spec.tenant_salt for spec in service.specs} == {"salt"}


async def test_no_request_is_sent_before_it_is_due(server_url: str):
    rows = [TraceRequest(timestamp, 9, 1, (0,)) for timestamp in (0, 0, 2000, 4000)]
    run = await replayed(server_url, "--speedup", "20", rows=rows)
    assert [outcome.request.due_s for outcome in run.outcomes] == [0.0, 0.0, 0.1, 0.2]
    assert all(outcome.sent_s >= outcome.request.due_s for outcome in run.outcomes)


async def test_every_output_is_timed(server_url: str):
    for outcome in (await replayed(server_url)).outcomes:
        times_s = outcome.answer.chunk_times_s
        assert len(times_s) == outcome.request.num_output_tokens
        assert outcome.request.due_s <= outcome.sent_s < times_s[0] <= times_s[-1] <= outcome.answer.end_s


async def test_a_refusal_is_counted_with_its_status_and_code(server_url: str, service: FakeGenerationService):
    service.script.refuse_with = Overloaded("full", retry_after_s=1)
    run = await replayed(server_url)
    assert (run.result.num_completed, run.result.errors) == (0, {"HTTP 429 overloaded": 6})


async def test_a_failure_within_a_stream_is_counted(server_url: str, service: FakeGenerationService):
    service.script.fail_after_tokens = 3
    assert (await replayed(server_url)).result.errors == {"in the stream: service_unavailable": 6}


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (STREAM, None),
        (STREAM.removesuffix("data: [DONE]\n\n"), "incomplete stream"),
        (STREAM.replace('"completion_tokens":2', '"completion_tokens":1'), "wrong number of output tokens"),
        (STREAM.replace('"prompt_tokens":9', '"prompt_tokens":8'), "wrong number of prompt tokens"),
        (STREAM.replace('"usage":{', '"other":{'), "no output or no usage"),
        ("data: {broken\n\n", "unreadable event"),
    ],
)
async def test_only_a_whole_answer_of_the_asked_length_counts(stream: str, error: str | None):
    workload = build_workload([TraceRequest(0, 9, 2, (0,))], Limits(64, 16, (128, 255)), speedup=1, scale=None)
    options = LoadOptions("other", max_concurrency=1, request_timeout_s=5, total_timeout_s=5, cache_salt="salt")
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=stream))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        (outcome,) = await replay(client, workload, options, lambda outcome: None)
    assert (outcome.error, outcome.answer is None) == (error, error is not None)


async def test_a_server_without_a_status_page_is_asked_for_its_model_card():
    pages = {"/v1/models": httpx.Response(200, json={"data": [{"id": "other", "max_model_len": 99}]})}
    transport = httpx.MockTransport(lambda request: pages.get(request.url.path, httpx.Response(404)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert await ask_server(client) == ServedModel("other", 99, workers=())


async def test_a_server_that_has_no_worker_yet_is_reported():
    pages = {"/v1/models": httpx.Response(200, json={"data": [{"id": "fish", "max_model_len": None}]})}
    transport = httpx.MockTransport(lambda request: pages.get(request.url.path, httpx.Response(404)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with pytest.raises(ServerError, match="no worker serves fish yet"):
            await ask_server(client)


async def test_a_server_that_hangs_costs_the_request_timeout_and_no_more(
    server_url: str, service: FakeGenerationService
):
    service.script.pause_after_tokens = 2
    run = await replayed(server_url, "--timeout-s", "0.3")
    assert run.result.errors == {"timeout": 6}
    async with asyncio.timeout(5):
        await service.all_closed.wait()


async def test_the_total_timeout_ends_the_run_and_counts_what_is_left(server_url: str, service: FakeGenerationService):
    service.script.pause_after_tokens = 2
    run = await replayed(server_url, "--total-timeout-s", "0.5", "--max-concurrency", "2")
    assert run.result.errors == {"unfinished": 6}
    assert sum(outcome.sent_s is not None for outcome in run.outcomes) == 2
    assert service.open_generations <= 2


async def test_no_more_requests_are_open_than_allowed(server_url: str, service: FakeGenerationService):
    run = await replayed(server_url, "--max-concurrency", "1")
    ends_s = [outcome.answer.end_s for outcome in run.outcomes]
    assert all(later.sent_s >= end_s for later, end_s in zip(run.outcomes[1:], ends_s, strict=False))
    assert run.result.latencies_s.send_delay.p99 > 0


async def test_a_server_that_is_not_there_is_named():
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9"):
        await replayed("http://127.0.0.1:9", rows=generate_trace(1, seed=0))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--speedup", "0"], "not positive"),
        (["--requests", "0"], "not positive"),
        (["--start", "-1"], "negative"),
        (["--token-ids", "9", "3"], "--token-ids 9 3"),
        (["--json", "/no/such/folder/file.json"], "make it first"),
    ],
)
def test_options_that_cannot_be_followed_are_refused_before_anything_is_sent(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert problem in capsys.readouterr().err
