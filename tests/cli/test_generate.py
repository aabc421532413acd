"""``eagleray generate`` with the packaged model."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest

from eagleray.cli.__main__ import main

FEW = ["--max-tokens", "4", "--temperature", "0"]


def test_the_answer_goes_to_standard_output_and_the_reason_of_a_cut_to_standard_error() -> None:
    command = [sys.executable, "-m", "eagleray.cli", "generate", *FEW, "import"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert shown.stdout.endswith("\n") and shown.stdout.strip()
    assert shown.stderr == "(stopped after --max-tokens 4)\n"


def test_json_has_one_object_per_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--json", *FEW, "import", "def"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("import", "def")
    assert len(first["token_ids"]) <= 4
    assert first["finish_reason"] in ("length", "stop")


def test_without_a_prompt_standard_input_is_the_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("class Foo:\n"))
    assert main(["generate", "--json", *FEW]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "class Foo:\n"


def test_chat_applies_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--json", *FEW, "hello"]) == 0
    assert main(["generate", "--json", "--chat", *FEW, "hello"]) == 0
    plain, chat = map(json.loads, capsys.readouterr().out.splitlines())
    assert chat["num_prompt_tokens"] > plain["num_prompt_tokens"]
