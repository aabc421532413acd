"""``eagleray serve`` for real: Ray, workers, HTTP, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

START_DEADLINE_S = 240.0
STOP_DEADLINE_S = 90.0
API_KEY = "only-for-friends"
MARK = "EAGLERAY_TEST_MARK"  # every process that the service starts inherits it


class Serving:
    """A running ``eagleray serve`` and what it prints."""

    def __init__(self, mark: str, *options: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "eagleray.cli", "serve", "--port", "0", "--prefill", "1", "--decode", "1"]
        self.mark, self.printed = mark, ""
        self.process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )

    def wait_for_line(self, pattern: str, deadline_s: float) -> re.Match[str]:
        """The first line that matches; fails with everything printed so far."""
        assert self.process.stdout is not None
        until_s = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while (found := re.search(pattern, self.printed)) is None:
                assert selector.select(until_s - time.monotonic()), f"nothing in time after:\n{self.printed}"
                part = os.read(self.process.stdout.fileno(), 65536).decode()
                assert part, f"it ended after:\n{self.printed}"
                self.printed += part
        return found

    def end(self, number: signal.Signals) -> int:
        """Send a signal, and the exit code."""
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=STOP_DEADLINE_S)
        self.printed += rest.decode()
        return self.process.returncode

    def processes_left(self) -> list[str]:
        """Command lines of living processes that carry the mark."""
        left = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    left.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended meanwhile, or is somebody else's
                continue
        return left


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    running = Serving(str(tmp_path), "--set", f"http.api_key={API_KEY}")
    yield running
    end_at_once(running)


def end_at_once(running: Serving) -> None:
    running.process.kill()
    running.process.wait(STOP_DEADLINE_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_leaves_nothing_behind(serving: Serving, number: signal.Signals) -> None:
    address = serving.wait_for_line(r"ready: eagleray-demo at (http://\S+)\n", START_DEADLINE_S)[1]
    assert httpx.get(f"{address}/ready").status_code == 200
    body = {"model": "eagleray-demo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 401
    key = {"Authorization": f"Bearer {API_KEY}"}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, headers=key, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] > 0
    assert len(serving.processes_left()) > 3
    assert serving.end(number) == 0
    assert serving.printed.rstrip().endswith("s  stopped")
    assert "Traceback" not in serving.printed and "raylet" not in serving.printed
    assert API_KEY not in serving.printed
    assert serving.processes_left() == []


def test_a_signal_during_the_start_ends_it_as_well(serving: Serving) -> None:
    serving.wait_for_line("starting Ray\n", START_DEADLINE_S)
    assert serving.end(signal.SIGTERM) == 0
    assert "Traceback" not in serving.printed
    assert serving.processes_left() == []


def test_without_a_compiler_it_serves_says_at_the_start_what_to_install_and_logs_it(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # its path is short enough for Ray's sockets
        environment = {"PATH": str(Path(sys.executable).parent), "XDG_CACHE_HOME": str(tmp_path), "RAY_TMPDIR": folder}
        running = Serving(str(tmp_path), environment=environment)
        try:
            running.wait_for_line(r"ready: eagleray-demo at (http://\S+)\n", START_DEADLINE_S)
            for role in ("prefill", "decode"):
                assert re.search(rf"{role} \S+ computes with torch \(no C compiler .*; install one", running.printed)
            logs = [file.read_text() for file in Path(folder).glob("ray/session_2*/logs/serve/replica_*.log")]
            assert sum("kernels: torch (no C compiler" in log for log in logs) == 2
        finally:
            end_at_once(running)
