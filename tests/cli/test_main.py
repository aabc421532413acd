"""The command as a whole: it starts fast, and what is wrong is one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from eagleray.cli.__main__ import COMMANDS, build_parser, main

HEAVY = ("torch", "ray", "pydantic", "rich", "httpx")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"\n    {name}\s", shown) for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "never"), [(["--help"], HEAVY), (["serve", "--help"], ("torch", "ray")), (["doctor", "--help"], HEAVY)]
)
def test_help_imports_nothing_heavy(words: list[str], never: tuple[str, ...]) -> None:
    program = (
        "import sys\nfrom eagleray.cli.__main__ import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"print('imported:', [name for name in {never!r} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert shown.stdout.endswith("imported: []\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        build_parser([name]).parse_args([name, "--help"])
    assert end.value.code == 0
    assert f"usage: eagleray {name}" in capsys.readouterr().out


def test_serve_help_lists_the_keys_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert "  http.port = 8000 " in shown
    assert "  transfer.transports = [shared_memory, tcp]" in shown
    assert "  speculation = null " in shown
    assert "  speculation.method (must be set) " in shown
    assert "  speculation.tree_branching = 1 " in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["serve", "--dtype", "float8"], "model.dtype='float8': "),
        (["serve", "--set", "http.prot=1"], "http.prot=1: unknown key"),
        (["serve", "--set", "speculation.model=/x"], "must be set beside model, to one of eagle3, eagle"),
        (["serve", "--set", "http.port"], "--set='http.port': write it as key.path=value"),
        (["serve", "--set", "http.port=["], "--set http.port='[': is not valid YAML"),
        (["serve", "--decode", "0"], "decode.replicas=0: at least 1"),
        (["serve", "/nowhere.yaml"], "config='/nowhere.yaml': cannot be read"),
        (["serve", "--model", "/nowhere"], "model.path='/nowhere': there is no such folder"),
        (["serve", "--memory", "1GiB"], "memory.budget_bytes='1GiB': the least that would do is "),
        (["serve", "--memory", "six"], "memory.budget_bytes='six': could not parse"),
        (["generate", "--temperature", "-1", "hi"], "temperature=-1.0: must be between 0 and 100"),
        (["status", "--url", "localhost"], "--url='localhost': write it as http://host:port"),
        (["status", "--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9; start one with"),
        (["chat", "--url", "http://127.0.0.1:9", "hi"], "no server answers at http://127.0.0.1:9; start one with"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.startswith(f"eagleray {words[0]}: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_ctrl_c_while_the_command_is_being_read_ends_it_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupt)
    assert main(["serve"]) == 130


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m eagleray.cli doctor --model {tmp_path} | head -c 1 >/dev/null"
    ended = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, timeout=100)
    assert ended.stderr == ""
    assert ended.returncode == 141
