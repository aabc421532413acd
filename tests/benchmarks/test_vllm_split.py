"""vLLM's split: what its proxy asks of which instance, how the instances are told apart, who has to yield."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from peers.split_proxy import create_proxy
from vllm_split import instances, let_pollers_yield, main

KV = {"remote_engine_id": "prefill-1", "remote_block_ids": [[4, 5]]}
ASKED = {
    "model": "fish",
    "prompt": [300, 301],
    "max_tokens": 8,
    "stream": True,
    "stream_options": {"include_usage": True},
}
EVENTS = [b'data: {"choices": [{"text": "a"}]}\n\n', b"data: [DONE]\n\n"]


class Instances:
    """Both, as the proxy sees them."""

    def __init__(self, prefill_status: int = 200, breaks_off: bool = False) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._prefill_status, self._breaks_off = prefill_status, breaks_off

    async def proxied(self, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        prefill = httpx.AsyncClient(transport=httpx.MockTransport(self._prefill), base_url="http://prefill")
        decode = httpx.AsyncClient(transport=httpx.MockTransport(self._decode), base_url="http://decode")
        app = httpx.ASGITransport(create_proxy(prefill, decode))
        async with prefill, decode, httpx.AsyncClient(transport=app, base_url="http://proxy") as client:
            return await (client.post(path, json=body) if body else client.get(path))

    def _prefill(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(("prefill", json.loads(request.content)))
        return httpx.Response(self._prefill_status, json={"choices": [{"text": "a"}], "kv_transfer_params": KV})

    def _decode(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "fish"}]})
        self.asked.append(("decode", json.loads(request.content)))
        return httpx.Response(200, content=self._events(), headers={"content-type": "text/event-stream"})

    async def _events(self) -> AsyncIterator[bytes]:
        yield EVENTS[0]
        if self._breaks_off:
            raise httpx.ReadError("gone")
        yield EVENTS[1]


async def test_the_decode_instance_gets_the_place_of_the_kv_that_the_prefill_instance_made():
    both = Instances()
    answer = await both.proxied("/v1/completions", ASKED)
    (first, prefilled), (second, decoded) = both.asked
    assert (first, second) == ("prefill", "decode")
    assert (prefilled["max_tokens"], prefilled["stream"], prefilled["prompt"]) == (1, False, [300, 301])
    assert prefilled["kv_transfer_params"]["do_remote_decode"] and "stream_options" not in prefilled
    assert decoded == {**ASKED, "kv_transfer_params": KV}
    assert answer.content == b"".join(EVENTS)
    assert answer.headers["content-type"].startswith("text/event-stream")


async def test_what_the_prefill_instance_refuses_is_not_asked_of_the_decode_instance():
    both = Instances(prefill_status=400)
    assert (await both.proxied("/v1/completions", ASKED)).status_code == 400
    assert [name for name, _ in both.asked] == ["prefill"]


async def test_an_answer_that_breaks_off_ends_with_an_error():
    answer = await Instances(breaks_off=True).proxied("/v1/completions", ASKED)
    assert answer.content.startswith(EVENTS[0]) and b'"ReadError"' in answer.content
    assert b"[DONE]" not in answer.content


async def test_models_are_those_of_the_decode_instance():
    assert (await Instances().proxied("/v1/models")).json() == {"data": [{"id": "fish"}]}


def test_the_instances_share_neither_ports_nor_cores():
    prefill, decode = instances(8123, threads=2)
    assert len({8123, prefill.port, decode.port, prefill.side_channel_port, decode.side_channel_port}) == 5
    assert prefill.environment()["VLLM_CPU_OMP_THREADS_BIND"] == "0,1"
    assert decode.environment()["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"
    roles = [json.loads(instance.command(["vllm"])[-1])["kv_role"] for instance in (prefill, decode)]
    assert roles == ["kv_producer", "kv_consumer"]


def test_an_instance_that_ends_says_which_and_why(capsys: pytest.CaptureFixture[str]):
    program = [sys.executable, "-c", "import sys; sys.exit('NIXL is not available')"]
    assert main(["--port", "1", "--", *program]) == 1
    assert "the prefill instance ended with 1: NIXL is not available" in capsys.readouterr().err


async def test_only_a_thread_that_polls_has_to_yield():
    programs = ("while True: pass", "import threading; threading.Event().wait()")
    polls, waits = (subprocess.Popen([sys.executable, "-c", program]) for program in programs)
    try:
        await let_pollers_yield([polls.pid, waits.pid], watch_s=0.5)
        assert os.sched_getscheduler(polls.pid) == os.SCHED_IDLE
        assert os.sched_getscheduler(waits.pid) == os.SCHED_OTHER
    finally:
        for process in (polls, waits):
            process.kill()
            process.wait()
