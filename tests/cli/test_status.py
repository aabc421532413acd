"""``eagleray status``."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from rich.console import Console

from eagleray.cli.__main__ import main
from eagleray.cli.status import render
from eagleray.core.acceptance import Acceptance
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.router.service import ServiceStatus

STATUS = ServiceStatus(
    ready=True,
    max_model_tokens=2048,
    workers=(
        WorkerSnapshot(worker_id="d1", role=Role.DECODE, epoch=1, num_running=7, num_reserved=2, blocks_total=100,
                       blocks_free=25, decode_step_s=0.0123, num_preemptions=4),
        WorkerSnapshot(worker_id="p1", role=Role.PREFILL, epoch=1, num_waiting=3, num_handed_over=5,
                       prefill_tokens_per_s=1234.5, transfer_bytes_total=3 * 2**20),
    ),
    num_queued=9,
    num_running=8,
    prefix_index="redis: up",
)  # fmt: skip


def shown(status: ServiceStatus) -> list[str]:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(render("http://x", status))
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_the_headline_tells_of_the_service() -> None:
    assert shown(STATUS)[0] == "http://x ready workers: 1 prefill + 1 decode queued: 9 running: 8 index: redis: up"


def test_there_is_a_row_per_worker_with_the_prefill_pool_first() -> None:
    *_, prefill, decode = shown(STATUS)
    assert prefill == "prefill p1 3 0 5 ░░░░░░░░░░ 0% 0 1,234 tok/s - 0 3.0 MiB"
    assert decode == "decode d1 0 7 2 ████████░░ 75% 0 - 12.3 ms 4 0 B"


def test_a_worker_that_guesses_has_a_line_of_what_came_of_it() -> None:
    acceptance = Acceptance(
        num_steps=100, num_draft_tokens=240, num_accepted_tokens=120, drafts_per_position=(80, 80, 80),
        accepted_per_position=(64, 40, 16), verify_s=12.5, draft_s=1.25,
    )  # fmt: skip
    workers = tuple(
        msgspec.structs.replace(worker, acceptance=acceptance if worker.role is Role.DECODE else None)
        for worker in STATUS.workers
    )
    assert shown(msgspec.structs.replace(STATUS, workers=workers))[-1] == (
        "d1 2.20 tokens per step, 2.50 in the 80% with guesses; 120 of 240 accepted, by position 80% 50% 20%; "
        "verifying 12.5 s, guessing 1.2 s"
    )


def test_a_service_that_is_not_ready_says_why() -> None:
    status = ServiceStatus(ready=False, reason="no decode worker", max_model_tokens=0)
    assert "not ready: no decode worker" in shown(status)[0]


def test_json_is_what_the_server_reports(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_model_tokens"] == 512


def test_json_has_what_follows_from_the_counts_of_guesses(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    acceptance = Acceptance.of_step(3, 3, 2, verify_s=0.5, draft_s=0.1)
    worker = msgspec.structs.replace(STATUS.workers[0], acceptance=acceptance)
    monkeypatch.setattr(server.service, "status", lambda: msgspec.structs.replace(STATUS, workers=(worker,)))
    assert main(["status", "--url", server.url, "--json"]) == 0
    [shown] = json.loads(capsys.readouterr().out)["workers"]
    assert shown["acceptance"]["acceptance_length"] == 3.0
    assert shown["acceptance"]["rate_per_position"] == [1.0, 1.0, 0.0]


def test_the_table_is_printed_for_a_running_server(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", server.url]) == 0
    assert f"{server.url}  ready  workers: 0 prefill + 0 decode" in capsys.readouterr().out


def test_a_server_that_asks_for_a_key_gets_it(
    locked_server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--url", locked_server.url, "--api-key", "only-for-friends"]) == 0
    monkeypatch.setenv("EAGLERAY_API_KEY", "only-for-friends")
    assert main(["status", "--url", locked_server.url]) == 0
    assert capsys.readouterr().out.count("ready") == 2


@pytest.mark.parametrize("interval", ["0", "-1", "x"])
def test_an_interval_that_makes_no_sense_is_refused(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["status", "--watch", interval])
    assert end.value.code == 2
    assert "--watch" in capsys.readouterr().err
