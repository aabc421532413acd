"""Servers in turn: how each is started, and what the tables say."""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from compare_served import Load, ServedComparison, served_sections
from floors import Machine
from provenance import provenance
from report import to_markdown
from servers import SERVERS, Server, StartError, running

OPTIONS = argparse.Namespace(
    threads=2, port=8123, prompt_tokens=512, output_tokens=64, set=["router.policy=round_robin"], vllm_python=None
)


def load(server: str, ttft_s: float, output_tokens_per_s: float) -> Load:
    same: dict[str, Any] = {"p50": ttft_s, "p95": ttft_s, "p99": ttft_s}
    fields = ("time_to_first_token", "time_per_output_token", "end_to_end")
    report = {
        "latencies_s": dict.fromkeys(fields, same),
        "throughput": {"output_tokens_per_s": output_tokens_per_s},
        "goodput": {"requests_per_s": 0.0},
        "num_completed": 4,
        "num_requests": 4,
    }
    return Load(server, start_s=3.0, others_share=0.02, run={"report": report})


def test_ratios_are_above_one_where_ours_is_better():
    loads = [load("eagleray", 0.5, 300.0), load("vllm", 1.0, 100.0), load("vllm", 3.0, 100.0)]
    failures = {"vllm-eager": "did not\nstart"}
    found = ServedComparison([provenance()], loads, failures, Machine(3e10, 3e12), limit_tokens_per_s=400.0)
    shown = to_markdown(served_sections(found))
    assert "| vllm | 2,000 | 2,000 |" in shown  # the median of two loads
    assert "| vllm | 4.00 | 4.00 | 4.00 | 4.00 | 4.00 | 4.00 | 4.00 | 3.00 | - |" in shown
    assert "of the limit, 400 tokens/s" in shown and "| 300 | 0.00 | 75% |" in shown
    assert "| vllm | 3 | 2 | 8 of 8 | 2.0% |" in shown
    assert "| vllm-eager | did not start |" in shown


def test_a_split_divides_the_threads():
    whole = SERVERS["eagleray"](Path("model"), OPTIONS).command
    split = SERVERS["eagleray-split"](Path("model"), OPTIONS).command
    assert "decode.num_threads=2" in whole and whole[whole.index("--prefill") + 1] == "0"
    assert {"prefill.num_threads=1", "decode.num_threads=1"} <= set(split)
    assert split[split.index("--prefill") + 1] == "1"
    assert "router.policy=round_robin" in whole


def test_a_server_without_its_python_is_refused():
    for server in ("vllm-eager", "vllm-split"):
        with pytest.raises(StartError, match="--vllm-python"):
            SERVERS[server](Path("model"), OPTIONS)


def test_a_split_vllm_without_nixl_is_refused(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"No module named 'nixl'\" >&2\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(StartError, match=r"No module named 'nixl'.*install nixl"):
        SERVERS["vllm-split"](Path("model"), argparse.Namespace(**{**vars(OPTIONS), "vllm_python": python}))


async def test_a_server_that_ends_says_why():
    program = "import sys; print('what it did'); sys.exit('no such model')"
    with pytest.raises(StartError, match="ended with 1: no such model"):
        async with running(Server([sys.executable, "-c", program], {}), _free_port()):
            pass


async def test_a_port_that_somebody_serves_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"--port {port}"):
            async with running(Server([sys.executable], {}), port):
                pass


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
