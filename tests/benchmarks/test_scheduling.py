"""The benchmark of the engine's loop: the whole program, for a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scheduling import main


@pytest.mark.slow
def test_every_turn_of_each_batch_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    assert main(["--batches", "1", "3", "--steps", "5", "--markdown", "--json", str(result)]) == 0
    shown, written = capsys.readouterr().out, json.loads(result.read_bytes())
    assert "| batch | update, us a step | schedule, us |" in shown and "| 3 | " in shown
    assert [(line["batch"], len(line["turns"])) for line in written["lines"]] == [(1, 5), (3, 5)]
    for line in written["lines"]:
        assert all(min(turn.values()) > 0 for turn in line["turns"])
    assert written["provenance"]["num_cores"] >= 1
