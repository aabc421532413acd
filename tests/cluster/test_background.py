"""What goes on beside a replica's own work: it is started again when it fails, and cleans up before it is gone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from eagleray.cluster import background
from eagleray.cluster.background import BackgroundLoop

SETTLE_DEADLINE_S = 5.0


class Work:
    """Fails as often as it is told to, then goes on until cancelled."""

    def __init__(self, num_failures: int = 0) -> None:
        self.num_failures = num_failures
        self.events: list[str] = []
        self.runs = threading.Event()

    async def run(self) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("the index said something that nobody expected")
        try:
            self.runs.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.events.append("left")

    async def close(self) -> None:
        self.events.append("closed")


def test_stopping_waits_until_the_work_has_left_and_closed_what_it_used() -> None:
    work = Work()
    loop = BackgroundLoop("test", work.run, work.close)
    assert work.runs.wait(SETTLE_DEADLINE_S)
    loop.stop()
    assert work.events == ["left", "closed"]
    assert "test" not in {thread.name for thread in threading.enumerate()}
    loop.stop()


def test_stopping_at_once_closes_too() -> None:
    work = Work()
    BackgroundLoop("test", work.run, work.close).stop()
    assert work.events[-1] == "closed"


def test_work_that_fails_is_logged_and_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "RESTART_DELAY_S", 0.01)
    work = Work(num_failures=2)
    loop = BackgroundLoop("test", work.run, work.close)
    assert work.runs.wait(SETTLE_DEADLINE_S)
    loop.stop()
    assert caplog.text.count("test failed; it is started again") == 2
