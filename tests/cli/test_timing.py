"""The parts of an answer's time, as shown."""

from __future__ import annotations

import msgspec
import pytest
from rich.console import Console

from eagleray.cli.client import ChatAnswer
from eagleray.cli.timing import spent_s, timing_line, timing_table, workers_of
from eagleray.core.acceptance import Acceptance
from eagleray.core.telemetry import Phase, TimeAccount

ACCOUNT = TimeAccount(
    queue_s=0.001, prefill_s=0.02, transfer_s=0.003, decode_s=0.4, network_s=0.005, total_s=0.429,
    time_to_first_token_s=0.02, num_prompt_tokens=50, num_cached_tokens=32, num_output_tokens=10,
    prefill_worker="p1", decode_worker="d1", attempts=1,
)  # fmt: skip
ANSWER = ChatAnswer("text", total_s=0.5, time_to_first_token_s=0.025, account=ACCOUNT)


def test_what_the_client_measured_beyond_the_servers_total_is_network() -> None:
    spent = spent_s(ACCOUNT, 0.5)
    assert sum(spent.values()) == pytest.approx(0.5)
    assert spent[Phase.NETWORK] == pytest.approx(0.005 + 0.071)
    assert spent[Phase.DECODE] == 0.4


def test_the_line_has_every_phase_and_the_reuse() -> None:
    line = timing_line(ANSWER)
    assert line.startswith(
        "10 tokens · 0.50 s · first token 25.0 ms · queue 1.0 ms · prefill 20.0 ms · transfer 3.0 ms"
    )
    assert line.endswith("32 of 50 prompt tokens reused")


def test_the_line_ends_with_the_tokens_per_step_where_the_worker_guessed() -> None:
    account = msgspec.structs.replace(ACCOUNT, acceptance=Acceptance(num_steps=4, num_accepted_tokens=5))
    answer = ChatAnswer("text", total_s=0.5, time_to_first_token_s=0.025, account=account)
    assert timing_line(answer).endswith("prompt tokens reused · 2.25 tokens per step")


def test_without_the_servers_account_the_line_has_the_clients_times() -> None:
    assert timing_line(ChatAnswer("text", 0.5, None, None)) == "0.50 s"


def test_the_table_shows_sum_and_client_total_side_by_side() -> None:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(timing_table(ANSWER, ACCOUNT))
    head, _, row = capture.get().rstrip("\n").split("\n")
    assert "= sum   client total   client TTFT" in head
    assert "500.0 ms       500.0 ms       25.0 ms" in row


def test_workers_are_named_once_when_one_did_both() -> None:
    assert workers_of(ACCOUNT) == "prefilled on p1, decoded on d1"
    assert workers_of(msgspec.structs.replace(ACCOUNT, prefill_worker=None)) == "prefilled and decoded on d1"
