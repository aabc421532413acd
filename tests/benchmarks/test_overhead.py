"""What the overhead benchmark rests on: an engine that says letters, a light client, and the system's own accounts."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from urllib.parse import urlsplit

import pytest
from bare_service import bare_service
from null_service import INDEX, RAY, DirectEngine, null_service
from overhead import IDLE, PACED, PARTS, PartResult, Run, sections
from process_cpu import ProcessUse, descendants, read_use
from provenance import provenance
from stream_load import Job, Window, run

from eagleray.router.fake_service import FakeGenerationService


def test_the_null_engine_answers_a_prompt_with_a_token() -> None:
    assert DirectEngine().first_token_s("Say.") > 0


async def test_the_client_counts_every_token_event_and_answer_of_its_window(
    server_url: str, service: FakeGenerationService
) -> None:
    service.script.answer = "abcdefgh"
    body = {"model": "fish", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    url = urlsplit(server_url)
    job = Job(
        host=str(url.hostname), port=url.port or 0, pids=(os.getpid(),), path="/v1/chat/completions",
        bodies=(json.dumps(body),) * 2, num_connections=2, settle_s=0.0, window_s=0.2,
    )  # fmt: skip
    window = await run(job)
    assert window.num_answers > 0 and window.num_bytes > 0
    assert 8 * (window.num_answers - 2) <= window.num_tokens <= 8 * (window.num_answers + 2)  # some lie across its ends
    assert window.num_events > window.num_tokens  # each answer ends with one that has no text
    assert len(window.first_event_s) > 0
    assert sum(window.answer_s) >= sum(window.first_event_s[: len(window.answer_s)]) > 0
    assert list(window.processes) == [os.getpid()] and window.processes[os.getpid()].cpu_s >= 0


async def test_a_bare_service_says_the_letters_that_it_was_asked_for() -> None:
    with bare_service() as (address, processes):
        url = urlsplit(address)
        body = {"model": "any", "max_tokens": 3, "seed": 20_000}
        job = Job(
            host=str(url.hostname), port=url.port or 0, pids=tuple(processes), path="/", bodies=(json.dumps(body),) * 2,
            num_connections=2, settle_s=0.0, window_s=0.3,
        )  # fmt: skip
        window = await run(job)
    assert window.num_events >= window.num_tokens  # each at its own step
    assert 3 * (window.num_answers - 2) <= window.num_tokens <= 3 * (window.num_answers + 2)
    assert set(window.processes) == set(processes)


async def test_processes_below_this_one_are_found_and_their_use_is_read() -> None:
    child = await asyncio.create_subprocess_exec("cat", stdin=asyncio.subprocess.PIPE)
    try:
        assert descendants(os.getpid())[child.pid].endswith("cat")
        assert read_use(child.pid).cpu_s >= 0
    finally:
        assert child.stdin is not None
        child.stdin.close()
        await child.wait()


def test_what_is_printed_while_the_service_runs_stays_out_of_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class ChattyService:
        address = "http://127.0.0.1:1"

        def __init__(self, *arguments: object) -> None:
            print("starting")

        def stop(self) -> None:
            print("(raylet) a task has failed")

    monkeypatch.setattr("eagleray.cluster.serve_app.LocalService", ChattyService)
    monkeypatch.setattr("null_service._wait_until_connected", lambda client: None)
    with null_service():
        pass
    print("the report")
    written = capsys.readouterr()
    assert written.out == "the report\n"
    assert written.err == "starting\n(raylet) a task has failed\n"


PROCESSES = {1: "decode", 2: "ingress", 3: INDEX, 4: RAY, 5: RAY}
ACCOUNT = {
    "queue.read_s": 0.5e-3, "queue.route_s": 0.25e-3, "queue.decode_accept_s": 1e-3, "queue.prefill_accept_s": 0.0,
    "queue.first_step_s": 0.125e-3, "queue_s": 1.875e-3, "prefill_s": 0.0625e-3, "network_s": 0.0625e-3,
    "time_to_first_token_s": 2e-3, "total_s": 2.5e-3,
}  # fmt: skip


def _window(num_answers: int, cpu_s: float, num_waits: int) -> Window:
    """Two seconds in which each process used so much."""
    return Window(
        duration_s=2.0, num_tokens=num_answers, num_events=num_answers, num_reads=1, num_bytes=1,
        num_answers=num_answers, first_event_s=(3e-3,) * num_answers, answer_s=(3.25e-3,) * num_answers,
        accounts_s=ACCOUNT if num_answers else {},
        processes=dict.fromkeys(PROCESSES, ProcessUse(cpu_s, num_waits)), client_cpu_s=0.0,
    )  # fmt: skip


def _tables() -> dict[str, dict[str, dict[str, str]]]:
    """Of a run of 100 requests: table -> row -> column -> cell."""
    idle = PartResult(IDLE, [(_window(0, cpu_s=0.02, num_waits=200), 0.01)], None)
    quiet, disturbed = _window(100, cpu_s=0.12, num_waits=500), _window(100, cpu_s=1.0, num_waits=1000)
    first = PartResult(PARTS[1], [(disturbed, 0.2), (quiet, 0.01)], 1e-3)
    requests = PartResult(PARTS[3], [(quiet, 0.01)], None)
    streams = PartResult(PACED, [(quiet, 0.01)], None)
    shown = sections(Run(provenance(), argparse.Namespace(), PROCESSES, [idle, first, requests], [first, streams]))
    return {
        table.header[0]: {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows} for table in shown
    }


def test_the_stages_of_a_first_token_are_all_of_its_time() -> None:
    stages = _tables()["where a first token's time goes, mean ms"]["first token, one worker"]
    assert stages["outside the account"] == "0.75" and stages["written"] == "0.25"
    assert (stages["read"], stages["routed"], stages["decode accepts"]) == ("0.50", "0.25", "1.00")
    assert stages["first event"] == "3.00"


def test_processes_beside_those_that_serve_are_shown_and_not_counted_with_them() -> None:
    row = _tables()["processor time"]["requests of one token, 8 at once, ms per request"]
    assert (row["all that serve"], row["decode"], row[INDEX], row[RAY]) == ("2.40", "1.20", "1.20", "2.40")


def test_what_a_process_needs_when_idle_is_not_put_down_to_requests() -> None:
    rows = _tables()["beyond idle"]
    assert rows["first token, one worker, ms per request"]["ingress"] == "1.00"
    assert rows["first token, one worker, waits per request"]["ingress"] == "3.00"


def test_a_bare_service_stands_beside_the_real_one() -> None:
    rows = _tables()["a bare service of two processes"]
    assert rows["first token, one worker"]["p50, ms"] == "3.00"
    assert rows[PACED.name]["us per token"] == "6000.0"  # 0.12 s of each of five processes for 100 tokens


def test_windows_that_others_disturbed_count_only_where_there_is_no_other_and_then_the_row_is_marked() -> None:
    quiet, disturbed = _window(1, 0.0, 0), _window(2, 0.0, 0)
    both = PartResult(PARTS[3], [(disturbed, 0.2), (quiet, 0.05)], None)
    assert (both.windows, both.others_share, both.name) == ([quiet], 0.05, PARTS[3].name)
    only_disturbed = PartResult(PARTS[3], [(disturbed, 0.2)], None)
    assert (only_disturbed.windows, only_disturbed.name) == ([disturbed], f"{PARTS[3].name} (disturbed)")
