"""The benchmark of a head's acceptance, on the demo model and its head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from draft_acceptance import main


def test_a_chain_of_three_is_counted_at_each_temperature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats, result = tmp_path / "chats.jsonl", tmp_path / "result.json"
    turns = [{"role": "user", "content": "Write a function `close(self)`."}, {"role": "assistant", "content": "No."}]
    chats.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:1]}) + "\n")
    words = ("--shapes", "chain of 3", "--temperatures", "0", "0.5", "--max-tokens", "16", "--json", str(result))
    assert main([str(chats), *words, "--markdown"]) == 0
    assert "| chain of 3 | 0.5 |" in capsys.readouterr().out
    report = json.loads(result.read_bytes())
    greedy, drawn = report["rows"]
    assert (report["num_prompts"], greedy["temperature"], drawn["temperature"]) == (2, 0, 0.5)
    assert 1 < greedy["tokens_per_step"] <= 4
    assert greedy["acceptance"]["num_draft_tokens"] >= greedy["acceptance"]["num_accepted_tokens"]
