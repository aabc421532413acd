"""What the overhead benchmark rests on: an engine that says letters, a light client, and the system's own accounts."""

from __future__ import annotations

import asyncio
import json
import os
from urllib.parse import urlsplit

import pytest
from null_service import DirectEngine, null_service
from process_cpu import descendants, read_use
from stream_load import Job, run

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
    assert list(window.processes) == [os.getpid()] and window.processes[os.getpid()].cpu_s >= 0


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
