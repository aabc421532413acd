"""What serving costs beside the model: time added to the first token, and processor time per token and per request.

    python benchmarks/overhead.py --json result.json --markdown > result.md

Starts the real service (Ray Serve, ingress, prefill and decode worker processes, the prefix index's server) with
executors that compute nothing. ``results/README.md`` says how the numbers are meant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from measure import Distribution
from null_engine import MAX_MODEL_TOKENS, new_null_executor
from process_cpu import ProcessUse, descendants
from provenance import Provenance, provenance
from report import Section, to_markdown, to_terminal
from rich.console import Console
from stream_load import Job, Window

from eagleray.core.clock import SystemClock
from eagleray.core.config import Config, Environment, parse_config, prepare_ray_environment
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.text.output import OutputText
from eagleray.text.tokenizer import Tokenizer

LOCAL_PREFILL_TOKENS: Final = 32
SHORT_PROMPT: Final = "Say."
LONG_PROMPT: Final = " ".join(["The plane carries tokens."] * 40)
PACE_STEP_US: Final = 20_000  # 50 tokens/s a stream
ENDLESS_TOKENS: Final = MAX_MODEL_TOKENS - 4096
SETTLE_S: Final = 1.0
LOAD_DEADLINE_S: Final = 120.0
READY_DEADLINE_S: Final = 60.0
DIRECT_REPEATS: Final = 500
_CLIENT: Final = Path(__file__).with_name("stream_load.py")


@dataclass(frozen=True)
class Result:
    """One part of the benchmark."""

    name: str
    window: Window

    def cpu_s(self, pids: Sequence[int]) -> float:
        return sum(self.window.processes[pid].cpu_s for pid in pids)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    prepare_ray_environment()
    with _service() as service:
        plane = Plane(service.address, _plane_processes())
        print(plane)
        for name, job in _jobs(options).items():
            if options.only and name not in options.only:
                continue
            window = plane.run(job)
            _show(name, window, plane)
    return 0


def _show(name: str, window: Window, plane: Plane) -> None:
    cpu = {title: window.processes[pid] for pid, title in plane.processes.items()}
    total = sum(use.cpu_s for use in cpu.values())
    firsts = sorted(window.first_event_s)
    print(f"== {name}: {window.duration_s:.2f} s, tokens {window.num_tokens} ({window.num_tokens/window.duration_s:.0f}/s), events {window.num_events}, reads {window.num_reads}, answers {window.num_answers}, client {window.client_cpu_s:.2f} s")
    for title, use in cpu.items():
        print(f"   {title}: {use.cpu_s:.2f} s, waits {use.num_waits}")
    if window.num_tokens:
        print(f"   per token {1e6*total/window.num_tokens:.1f} us")
    if window.num_answers:
        print(f"   per answer {1e3*total/window.num_answers:.2f} ms; ttft p50 {1e3*firsts[len(firsts)//2]:.2f} p95 {1e3*firsts[int(.95*len(firsts))]:.2f} n={len(firsts)}", {k: round(1e3*v,3) for k,v in window.accounts_s.items()})


@dataclass(frozen=True)
class Plane:
    """The running service: where it listens, and the processes that requests and tokens pass through."""

    address: str
    processes: dict[int, str]

    def run(self, job: Job) -> Window:
        url = urlsplit(self.address)
        job = msgspec.structs.replace(job, host=url.hostname, port=url.port, pids=tuple(self.processes))
        command = [sys.executable, str(_CLIENT)]
        done = subprocess.run(
            command, input=msgspec.json.encode(job), capture_output=True, timeout=LOAD_DEADLINE_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the client failed: {done.stderr.decode(errors='replace')[-2000:]}")
        return msgspec.json.decode(done.stdout, type=Window)


def _jobs(options: argparse.Namespace) -> dict[str, Job]:
    def streams(count: int, step_us: int) -> Job:
        bodies = tuple(_body(SHORT_PROMPT, ENDLESS_TOKENS, step_us, index) for index in range(count))
        return _job(bodies, count, options.window_s, SETTLE_S)

    def requests(prompt: str, connections: int, gap_s: float = 0.0) -> Job:
        bodies = tuple(_body(prompt, 1, 0, index) for index in range(2000))
        return msgspec.structs.replace(_job(bodies, connections, options.window_s, SETTLE_S), gap_s=gap_s)

    return {
        "idle": _job((_body(SHORT_PROMPT, 1, 0, 0),), 1, options.window_s, SETTLE_S, num_rounds=1),
        "first token, local": requests(SHORT_PROMPT, 1, 0.01),
        "first token, split": requests(LONG_PROMPT, 1, 0.01),
        "8 at once, local": requests(SHORT_PROMPT, 8),
        "paced": streams(16, PACE_STEP_US),
        "saturated": streams(64, 0),
    }


def _job(
    bodies: tuple[str, ...], num_connections: int, window_s: float, settle_s: float, num_rounds: int | None = None
) -> Job:
    return Job(host="", port=0, path="/v1/chat/completions", bodies=bodies, num_connections=num_connections,
        settle_s=settle_s, window_s=window_s, num_rounds=num_rounds, pids=())


def _body(prompt: str, num_tokens: int, step_us: int, salt: int) -> str:
    return msgspec.json.encode({
        "model": "eagleray-demo",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": num_tokens,
        "seed": step_us,
        "ignore_eos": True,
        "return_timing": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": f"{salt}",
    }).decode()


@contextlib.contextmanager
def _service() -> Iterator[Any]:
    from eagleray.cluster.serve_app import LocalService

    engine = {"block_size_tokens": 16, "max_num_seqs": 64}
    config = parse_config({
        "prefill": {"replicas": 1, "engine": engine, "drain_deadline_s": 1},
        "decode": {"replicas": 1, "engine": engine, "drain_deadline_s": 1},
        "router": {"local_prefill_tokens": LOCAL_PREFILL_TOKENS, "policy": "prefix_aware"},
        "http": {"port": 0},
    })
    service = LocalService(config, Environment(), lambda text: print(text, file=sys.stderr), new_null_executor)
    try:
        import httpx
        client = httpx.Client(base_url=service.address, trust_env=False)
        deadline = time.monotonic() + READY_DEADLINE_S
        while len(client.get("/v1/status").json()["workers"]) < 2:
            if time.monotonic() > deadline:
                raise RuntimeError("workers not connected")
            time.sleep(0.05)
        yield service
    finally:
        service.stop()


def _plane_processes() -> dict[int, str]:
    return {pid: title for pid, title in descendants(os.getpid()).items() if title.startswith("ray::ServeReplica")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="overhead.py")
    parser.add_argument("--window-s", type=float, default=8.0)
    parser.add_argument("--only", nargs="*")
    return parser


if __name__ == "__main__":
    sys.exit(main())
