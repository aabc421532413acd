"""Requests of one length, open and closed loop, against the real HTTP front over a fake service."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from load import ServerError
from load_run import Run, as_json, run_load
from serve import build_rows, main, objective_of, parse_options

from eagleray.router.fake_service import FakeGenerationService

SMALL = ("--requests", "6", "--prompt-tokens", "40", "--output-tokens", "8")


async def served(url: str, *arguments: str) -> Run:
    options = parse_options(["--url", url, *SMALL, *arguments])
    return await run_load(options, build_rows(options), objective_of(options))


async def test_every_request_has_the_asked_lengths_and_a_prompt_of_its_own(
    server_url: str, service: FakeGenerationService
):
    run = await served(server_url, "--concurrency", "3")
    assert run.result.num_completed == 6
    assert {(spec.num_prompt_tokens, spec.sampling.max_tokens) for spec in service.specs} == {(40, 8)}
    assert len({spec.token_ids for spec in service.specs}) == 6


async def test_a_closed_loop_sends_the_next_request_when_one_is_answered(server_url: str):
    run = await served(server_url, "--concurrency", "2")
    ends_s = sorted(outcome.answer.end_s for outcome in run.outcomes)
    sent_s = sorted(outcome.sent_s for outcome in run.outcomes)
    assert all(sent >= end for sent, end in zip(sent_s[2:], ends_s, strict=False))


def test_an_open_loop_has_the_asked_rate_and_the_same_gaps_for_the_same_seed():
    poisson = build_rows(parse_options(["--rate", "4", "--requests", "4000"]))
    again = build_rows(parse_options(["--rate", "4", "--requests", "4000"]))
    fixed = build_rows(parse_options(["--rate", "4", "--requests", "3", "--arrivals", "fixed"]))
    assert poisson == again
    assert poisson[-1].timestamp / 4000 == pytest.approx(250, rel=0.05)
    assert [row.timestamp for row in fixed] == [0.0, 250.0, 500.0]


@pytest.mark.parametrize(("limit_ms", "share"), [("60000", 1.0), ("0.000001", 0.0)])
async def test_goodput_counts_answers_within_the_objective(server_url: str, limit_ms: str, share: float):
    run = await served(server_url, "--concurrency", "6", "--ttft-slo-ms", limit_ms)
    assert run.result.goodput.share == share


async def test_the_key_is_sent_and_written_nowhere(locked_server_url: str):
    run = await served(locked_server_url, "--concurrency", "6", "--api-key", "key-of-the-server")
    assert run.result.num_completed == 6
    assert b"key-of-the-server" not in as_json(run)


async def test_without_the_key_a_server_that_asks_for_one_is_reported(locked_server_url: str):
    with pytest.raises(ServerError, match="401"):
        await served(locked_server_url, "--concurrency", "6")


async def test_the_command_prints_and_writes_the_report(
    server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--url", server_url, *SMALL, "--concurrency", "2", "--markdown", "--json", str(tmp_path / "run.json")]
    assert await asyncio.to_thread(main, [*arguments, "--tpot-slo-ms", "60000"]) == 0
    printed = capsys.readouterr().out
    assert "6 requests of 40 + 8 tokens, 2 at a time" in printed and "(100.0% of the requests)" in printed
    assert (tmp_path / "run.json").exists()
