"""Servers in turn: how each is started, and what the tables say."""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

import compare_served
import pytest
from compare_served import NOT_NAMED, _joined, turns
from floors import Machine
from process_cpu import stat_fields
from provenance import provenance
from report import to_markdown
from served_comparison import Load, ServedComparison, served_sections
from servers import SERVERS, Server, StartError, running

OPTIONS = argparse.Namespace(
    threads=2, kv_gib=1, prompt_tokens=512, output_tokens=64, set=["router.policy=round_robin"], vllm_python=None
)


def load(server: str, ttft_s: float, output_tokens_per_s: float, is_kept: bool = True, **phases_mean_s: float) -> Load:
    same: dict[str, Any] = {"p50": ttft_s, "p95": ttft_s, "p99": ttft_s}
    fields = ("time_to_first_token", "time_per_output_token", "end_to_end")
    report = {
        "latencies_s": dict.fromkeys(fields, same),
        "throughput": {"output_tokens_per_s": output_tokens_per_s},
        "goodput": {"requests_per_s": 0.0},
        "phases_mean_s": phases_mean_s,
        "num_completed": 4,
        "num_requests": 4,
    }
    return Load(
        server, round=1, start_s=3.0, has_tcmalloc=True, between_turns="stopped", others_share=0.02 if is_kept else 0.5,
        idle_share=0.01, is_kept=is_kept, run={"report": report},
    )  # fmt: skip


def comparison(*loads: Load, **failures: str) -> ServedComparison:
    return ServedComparison([provenance()], loads, failures, Machine(3e10, 3e12), limit_tokens_per_s=400.0)


def test_ratios_are_above_one_where_ours_is_better():
    loads = [load("eagleray", 0.5, 300.0), load("vllm", 1.0, 100.0), load("vllm", 3.0, 100.0)]
    shown = to_markdown(served_sections(comparison(*loads, eager="did not\nstart")))
    assert "| vllm | 2,000 (1,000 to 3,000) | 2,000 (1,000 to 3,000) |" in shown
    assert "| vllm | 4.00 | 4.00 | 4.00 | 4.00 | 4.00 | 4.00 | 4.00 | 3.00 | - |" in shown
    assert "of the limit, 400 tokens/s" in shown and "| 300 | 0.00 | 75% |" in shown
    assert "| vllm | 3 | yes | stopped | 2 | 0 | 8 of 8 | 2.0% | 1.0% |" in shown
    assert "| eager | did not start |" in shown


def test_loads_that_others_disturbed_count_only_where_there_are_no_others():
    loads = [load("vllm", 1.0, 100.0), load("vllm", 9.0, 9.0, is_kept=False), load("slow", 2.0, 50.0, is_kept=False)]
    shown = to_markdown(served_sections(comparison(*loads)))
    assert "| vllm | 1,000 | 1,000 |" in shown and "| slow, disturbed | 2,000 | 2,000 |" in shown
    assert "| vllm | 3 | yes | stopped | 1 | 1 | 8 of 8 | 2.0% | 1.0% |" in shown
    assert "| slow | 3 | yes | stopped | 0 | 1 | 4 of 4 | 50.0% | 1.0% |" in shown


def test_phases_are_shown_of_servers_that_account_for_them_and_of_no_others():
    loads = [
        load("eagleray", 1.0, 1.0, queue=0.5, decode=2.0),
        load("eagleray", 1.0, 1.0, queue=0.25, decode=4.0),
        load("eagleray", 1.0, 1.0, is_kept=False, queue=9.0, decode=9.0),
        load("eagleray-split", 1.0, 1.0, queue=0.001, transfer=0.01, decode=1.0),
        load("vllm", 1.0, 1.0),
    ]
    shown = to_markdown(served_sections(comparison(*loads)))
    [table] = [table for table in shown.split("\n\n") if table.startswith("| phase of a request")]
    header, _, ours, of_the_split = table.splitlines()
    assert header.endswith(" | queue | decode | transfer |")
    assert ours == "| eagleray | 375 (250 to 500) | 3,000 (2,000 to 4,000) | 0.00 (0.00 to 0.00) |"
    assert of_the_split == "| eagleray-split | 1.00 | 1,000 | 10 |"
    assert "phase of a request" not in to_markdown(served_sections(comparison(load("vllm", 1.0, 1.0))))


@pytest.mark.parametrize(("rate", "asked"), [(None, (None, 8)), (0.5, (0.5, None))])
async def test_a_load_is_asked_for_at_its_rate_or_with_so_many_in_flight(
    rate: float | None, asked: tuple[float | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[argparse.Namespace] = []

    async def run_load(load: argparse.Namespace, *rest: object) -> None:
        loads.append(load)

    monkeypatch.setattr(compare_served, "run_load", run_load)
    monkeypatch.setattr(compare_served, "as_dict", lambda run: {})
    options = argparse.Namespace(
        **vars(OPTIONS), rate=rate, concurrency=8, timeout_s=9.0, ttft_slo_ms=5000.0, tpot_slo_ms=150.0
    )
    await compare_served._one_load(options, 8123, 4, compare_served._pace(options))
    await compare_served._warm_up(options, 8123)
    assert [(load.requests, load.rate, load.concurrency) for load in loads] == [(4, *asked), (8, None, 8)]


def test_servers_take_turns():
    assert list(turns(["a", "b"], 2)) == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]


def test_of_two_pieces_reasons_of_what_was_measured_are_dropped():
    before = comparison(load("eagleray", 1.0, 1.0), vllm=NOT_NAMED, split="no NIXL", eager="too slow")
    found = comparison(load("vllm", 1.0, 1.0), load("eager", 1.0, 1.0), eagleray=NOT_NAMED, eager="died")
    joined = _joined(before, found)
    assert [each.server for each in joined.loads] == ["eagleray", "vllm", "eager"]
    assert joined.failures == {"split": "no NIXL", "eager": "died"}


def test_workers_of_a_split_take_turns_on_all_threads():
    whole = SERVERS["eagleray"](Path("model"), OPTIONS, 8123).command
    split = SERVERS["eagleray-split"](Path("model"), OPTIONS, 8133).command
    assert "decode.num_threads=2" in whole and whole[whole.index("--prefill") + 1] == "0"
    assert {"prefill.num_threads=2", "decode.num_threads=2", "cores=shared"} <= set(split)
    assert split[split.index("--prefill") + 1] == "1"
    assert "router.policy=round_robin" in whole
    assert whole[whole.index("--port") + 1] == "8123" and split[split.index("--port") + 1] == "8133"


def test_a_server_without_its_python_is_refused():
    for server in ("vllm-eager", "vllm-split"):
        with pytest.raises(StartError, match="--vllm-python"):
            SERVERS[server](Path("model"), OPTIONS, 8123)


def test_a_split_vllm_without_nixl_is_refused(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"No module named 'nixl'\" >&2\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(StartError, match=r"No module named 'nixl'.*install nixl"):
        SERVERS["vllm-split"](Path("model"), argparse.Namespace(**{**vars(OPTIONS), "vllm_python": python}), 8123)


async def test_a_server_that_ends_says_why():
    program = "import sys; print('what it did'); sys.exit('no such model')"
    with pytest.raises(StartError, match="ended with 1: no such model"):
        async with running(Server([sys.executable, "-c", program], {}, _free_port())):
            pass


_SERVER = """
import http.server, json, sys

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "fish"}]}).encode())

    do_POST = do_GET

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


async def test_a_server_that_is_stopped_goes_on_and_ends_even_so():
    port = _free_port()
    async with running(Server([sys.executable, "-c", _SERVER, str(port)], {}, port)) as started:
        started.stop()
        assert await _reaches(started.pid, "T")
        started.resume()
        assert await _reaches(started.pid, "SR")
        started.stop()
    assert not Path(f"/proc/{started.pid}").exists()


async def _reaches(pid: int, states: str) -> bool:
    """Whether the process comes to one of these states, letters of proc(5), in a few seconds."""
    async with asyncio.timeout(5):
        while stat_fields(pid)[0] not in states:
            await asyncio.sleep(0.01)
    return True


async def test_a_port_that_somebody_serves_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"port {port}"):
            async with running(Server([sys.executable], {}, port)):
                pass


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
