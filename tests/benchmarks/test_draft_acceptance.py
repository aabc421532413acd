"""The benchmark of a head's acceptance, on the demo model and its head."""

from __future__ import annotations

import json
from pathlib import Path

import draft_acceptance
import pytest
from draft_acceptance import main

from eagleray.core.acceptance import Acceptance


def write_chats(path: Path) -> Path:
    """One with an answer and one without."""
    turns = [{"role": "user", "content": "Write a function `close(self)`."}, {"role": "assistant", "content": "No."}]
    path.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:1]}) + "\n")
    return path


def test_a_chain_of_three_is_counted_at_each_temperature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats, result = write_chats(tmp_path / "chats.jsonl"), tmp_path / "result.json"
    words = ("--shapes", "chain of 3", "--temperatures", "0", "0.5", "--max-tokens", "16", "--json", str(result))
    assert main([str(chats), *words, "--markdown"]) == 0
    assert "| chain of 3 | 0.5 |" in capsys.readouterr().out
    report = json.loads(result.read_bytes())
    greedy, drawn = report["rows"]
    assert (report["num_prompts"], greedy["temperature"], drawn["temperature"]) == (2, 0, 0.5)
    assert 1 < greedy["tokens_per_step"] <= 4
    assert greedy["acceptance"]["num_draft_tokens"] >= greedy["acceptance"]["num_accepted_tokens"]


def test_rejection_reaches_the_engine_and_leaves_trees_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def fake_llm(model: str, *, speculation: dict[str, object], **_: object) -> None:
        asked.append((speculation["num_speculative_tokens"], speculation["verification"]))

    monkeypatch.setattr(draft_acceptance, "LLM", fake_llm)
    monkeypatch.setattr(draft_acceptance, "count", lambda *_: Acceptance())
    chats = str(write_chats(tmp_path / "chats.jsonl"))
    assert main([chats, "--verification", "rejection", "--markdown"]) == 0
    assert asked == [(3, "rejection"), (5, "rejection")]
    said = capsys.readouterr()
    assert "trees are left out" in said.err and "| verification | rejection |" in said.out
    with pytest.raises(SystemExit, match="chains"):
        main([chats, "--verification", "rejection", "--shapes", "tree of 15, 5 deep"])
