"""What the pages show can be copied: YAML is a valid configuration, Python compiles, commands have these options."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eagleray.api.openai_types import ChatCompletionRequest
from eagleray.cli.__main__ import build_parser
from eagleray.cli.options import config_from
from eagleray.core.config import load_config


def _commands(pages: Any, program: str) -> list[list[str]]:
    """The words of every command line of ``program``, without it."""
    lines: Iterator[str] = (
        line for page in pages for block in page.blocks("bash") for line in block.text.replace("\\\n", " ").splitlines()
    )
    words = [shlex.split(line, comments=True) for line in lines]
    return [rest for first, *rest in filter(None, words) if first == program]


@pytest.fixture
def my_yaml(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The README's configuration, under the name that the commands give it."""
    [block] = page["README.md"].blocks("yaml")
    path = tmp_path / "my.yaml"
    path.write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return path


def test_the_configuration_of_the_readme_is_valid_and_differs_from_the_defaults(my_yaml: Path) -> None:
    config = load_config(my_yaml)
    assert (config.prefill.replicas, config.http.port) == (1, 8001)
    assert config.router == load_config().router


def test_every_eagleray_command_has_these_options_and_a_valid_configuration(pages: Any, my_yaml: Path) -> None:
    commands = _commands(pages, "eagleray")
    assert {words[0] for words in commands} >= {"serve", "doctor", "chat", "status", "generate"}
    for words in commands:
        arguments = build_parser(words).parse_args(words)
        if arguments.command == "serve" and "newcomer" not in str(words):
            config_from(arguments)


def test_every_make_target_exists(root: Path, pages: Any) -> None:
    targets = set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = _commands(pages, "make")
    assert {"demo", "test"} <= {words[0] for words in commands} <= targets


def test_every_option_of_the_benchmark_exists(root: Path, pages: Any) -> None:
    runs = [words[1].removeprefix("ARGS=").split() for words in _commands(pages, "make") if words[0] == "bench"]
    files = ("replay.py", "load_run.py")  # the second has the options that all loads share
    source = "".join((root / "benchmarks" / name).read_text(encoding="utf-8") for name in files)
    assert runs
    for words in runs:
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


def test_every_body_sent_with_curl_is_a_request_that_the_api_takes(pages: Any) -> None:
    commands = _commands(pages, "curl")
    assert commands
    for words in commands:
        ChatCompletionRequest.model_validate_json(words[words.index("-d") + 1])


def test_python_compiles_and_every_name_imported_from_eagleray_exists(pages: Any) -> None:
    blocks = [block for page in pages for block in page.blocks("python")]
    assert len(blocks) >= 5
    for block in blocks:
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eagleray"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], block.page


def test_the_policy_that_the_guide_shows_chooses_a_worker(page: Any) -> None:
    from eagleray.core.snapshot import Role, WorkerSnapshot
    from eagleray.router.view import ClusterView, RoutingRequest, WorkerView

    [block] = page["docs/add_a_policy.md"].blocks("python")
    names: dict[str, Any] = {}
    exec(compile(f"from __future__ import annotations\n{block.text}", "add_a_policy.md", "exec"), names)
    busy, idle = (
        WorkerView(WorkerSnapshot(worker_id=name, role=Role.DECODE, epoch=1, blocks_free=9, num_running=running))
        for name, running in (("busy", 3), ("idle", 0))
    )
    view = ClusterView({}, {"busy": busy, "idle": idle}, 1024, 32, 1e9)
    assert names["Newcomer"]().choose(RoutingRequest(20, 10, 16, sequence=0), view).decode == "idle"
