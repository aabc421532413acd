"""What the pages list is what the code has: states, phases, metrics, variables, families, sentences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from eagleray.core.request import TRANSITIONS, RequestState
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.core.telemetry import Phase
from eagleray.models.registry import FAMILIES
from eagleray.router.metrics import IngressMetrics

_LABELS = {"gen_ai_request_model", "gen_ai_token_type"}


def _rows(section: str) -> list[list[str]]:
    """Cells of the rows of all tables, headings and rules left out."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rules = {index for index, line in enumerate(lines) if set(line) <= set("|- ")}
    kept = [line for index, line in enumerate(lines) if index not in rules and index + 1 not in rules]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


def _codes(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def test_the_state_table_is_the_one_in_core_request(page: Any) -> None:
    written: dict[str, set[str]] = {}
    for states, targets in _rows(page["docs/request_life.md"].section("## States")):
        written.update({state: _codes(targets) for state in _codes(states)})
    assert written == {state.name: {target.name for target in TRANSITIONS[state]} for state in RequestState}


def test_the_phases_are_the_closed_set(page: Any) -> None:
    rows = _rows(page["docs/request_life.md"].section("## The phase clock"))
    assert {phase for phase, *_ in rows} == {phase.value for phase in Phase}


def test_every_metric_is_listed_and_no_other(page: Any) -> None:
    snapshot = WorkerSnapshot(worker_id="w", role=Role.DECODE, epoch=1)
    exposition = IngressMetrics("m").text([snapshot], 0, 0, index_up=True)
    exposed = {name for name in re.findall(r"^# TYPE (\w+)", exposition, re.MULTILINE) if not name.endswith("_created")}
    section = page["docs/operations.md"].section("## Metrics")
    listed = {name for name in _codes(section) if re.fullmatch(r"(gen_ai|eagleray)_\w+", name)}
    assert listed - _LABELS == exposed


def test_every_listed_variable_is_one_that_core_config_knows(root: Path, page: Any) -> None:
    source = (root / "core" / "config.py").read_text(encoding="utf-8")
    rows = _rows(page["docs/operations.md"].section("## Environment variables"))
    assert rows
    assert [name for name, _ in rows if f'"{name.strip("`")}"' not in source] == []


def test_every_family_is_in_the_readme(page: Any) -> None:
    supported = page["README.md"].section("## What is supported").lower()
    assert [family for family in FAMILIES if family not in supported] == []


def test_every_sentence_of_a_refusal_is_said_somewhere(root: Path, page: Any) -> None:
    folders = ("api", "cli", "cluster", "core", "engine", "kv_transfer", "models", "router", "workers")
    text = "".join(file.read_text(encoding="utf-8") for folder in folders for file in (root / folder).rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", text)  # one sentence over several lines
    rows = _rows(page["docs/operations.md"].section("## When it refuses"))
    sentences = [sentence for cell, _ in rows for sentence in _codes(cell) if " " in sentence]
    assert len(sentences) > 8
    parts = [part.strip() for sentence in sentences for part in re.split(r"\.\.\.|=|: ", sentence)]
    assert [part for part in parts if " " in part and part not in said] == []
