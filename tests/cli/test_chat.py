"""``eagleray chat`` against a server."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest

from eagleray.cli.__main__ import main
from eagleray.cli.chat import Conversation
from eagleray.cli.client import ApiClient
from eagleray.core.clock import SystemClock
from eagleray.core.errors import EagleRayError, Overloaded


def test_one_question_prints_the_answer_and_its_times(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.service.script.answer = "Hello!"
    assert main(["chat", "--url", server.url, "--temperature", "0.5", "--system", "Be brief.", "hi"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "Hello!\n"
    assert "queue 10.0 ms · prefill 10.0 ms" in shown.err
    spec = server.service.specs[0]
    assert spec.sampling.temperature == 0.5
    assert server.service._tokenizer.decode(spec.token_ids).count("Be brief.") == 1


@pytest.mark.parametrize("given", ["option", "environment"])
def test_the_key_comes_from_the_option_or_the_environment(
    locked_server: Any, given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    locked_server.service.script.answer = "Hello!"
    monkeypatch.setenv("EAGLERAY_API_KEY", "only-for-friends" if given == "environment" else "not-this-one")
    options = ["--api-key", "only-for-friends"] if given == "option" else []
    assert main(["chat", "--url", locked_server.url, *options, "hi"]) == 0
    assert capsys.readouterr().out == "Hello!\n"


def test_a_conversation_keeps_its_history_until_the_input_ends(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.service.script.answer = "Hello!"
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\nsecond\n"))
    assert main(["chat", "--url", server.url]) == 0
    assert capsys.readouterr().out == "Hello!\nHello!\n"
    prompts = [server.service._tokenizer.decode(spec.token_ids) for spec in server.service.specs]
    assert len(prompts) == 2
    assert re.search("first.*Hello!.*second", prompts[1], re.DOTALL)


def test_a_refused_question_does_not_end_the_conversation(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.service.script.refuse_with = Overloaded("no room", 1.0)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n"))
    assert main(["chat", "--url", server.url]) == 0
    assert capsys.readouterr().err.count("eagleray chat: no room\n") == 2


def test_what_arrived_before_an_interruption_stays_in_the_history(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.service.script.answer = "Hello!"

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with ApiClient(server.url, SystemClock()) as client:
        conversation = Conversation(client, "fish", {})
        monkeypatch.setattr("eagleray.cli.chat.write_now", interrupt)
        with pytest.raises(KeyboardInterrupt):
            conversation.ask("hi")
    assert conversation.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "H"}]


def test_a_question_that_was_never_answered_is_forgotten(server: Any) -> None:
    server.service.script.refuse_with = Overloaded("no room", 1.0)
    with ApiClient(server.url, SystemClock()) as client:
        conversation = Conversation(client, "fish", {})
        with pytest.raises(EagleRayError):
            conversation.ask("hi")
    assert conversation.messages == []


def test_an_answer_cannot_steer_the_terminal(server: Any) -> None:
    server.service.script.answer = "\x1b[2Jbang\tx"
    command = [sys.executable, "-m", "eagleray.cli", "chat", "--url", server.url, "hi"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout == "\u241b[2Jbang\tx\n"
