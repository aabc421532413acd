"""``eagleray demo``: what a user sees of each answer. The end-to-end tests start a service with the same
model and head, of a configuration of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eagleray.cli import demo
from eagleray.cli.client import ChatAnswer
from eagleray.core.acceptance import Acceptance
from eagleray.core.telemetry import TimeAccount


class FakeClient:
    """Answers every question with the same text, in a time of which 5 of 9 tokens were guessed."""

    def __init__(self, acceptance: Acceptance | None) -> None:
        self.account = TimeAccount(
            queue_s=0.001, prefill_s=0.02, transfer_s=0.003, decode_s=0.4, network_s=0.005, total_s=0.429,
            time_to_first_token_s=0.03, num_prompt_tokens=50, num_cached_tokens=32, num_output_tokens=9,
            prefill_worker="p1", decode_worker="d1", attempts=1, route_reason="shortest", acceptance=acceptance,
        )  # fmt: skip

    def stream_chat(self, body: dict[str, Any], show: Callable[[str], None]) -> ChatAnswer:
        show("Hello!")
        return ChatAnswer("Hello!", total_s=0.5, time_to_first_token_s=0.025, account=self.account)


def test_each_answer_has_its_times_its_workers_and_its_tokens_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    demo._ask_all(FakeClient(Acceptance(num_steps=4, num_accepted_tokens=5)), "fish")  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert shown.count("Hello!") == shown.count("500.0 ms       500.0 ms") == len(demo.QUESTIONS)
    assert shown.count("prefilled on p1, decoded on d1 (shortest)\n2.25 tokens per step:") == len(demo.QUESTIONS)
    assert max(map(len, shown.splitlines())) <= 120  # what a terminal has


def test_without_guesses_nothing_is_said_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    demo._ask_all(FakeClient(None), "fish")  # type: ignore[arg-type]
    assert "tokens per step" not in capsys.readouterr().out
