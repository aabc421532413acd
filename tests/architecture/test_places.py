"""The repository names no machine: no absolute path of one, and no host to fetch packages from."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

_MACHINE_PATH = re.compile(r"(?<![\w.}\])-])/(?:home|root|Users|work)/\w")
_REGISTRY_HOST = re.compile(
    r"\b(?:pypi|files\.python(?:hosted)|registry\.npmjs|download\.pytorch|deb\.debian|proxy\.golang)\.org\b"
)
_DATA_SUFFIXES = {".safetensors", ".json", ".gz", ".png"}


def _places(text: str) -> list[str]:
    return [match[0] for pattern in (_MACHINE_PATH, _REGISTRY_HOST) for match in pattern.finditer(text)]


def test_no_file_names_a_path_of_one_machine_or_the_host_of_a_registry(source: Any) -> None:
    if not (source.root / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the repository is unknown")
    list_files = ["git", "-c", f"safe.directory={source.root}", "ls-files", "-zco", "--exclude-standard"]
    listed = subprocess.run(list_files, cwd=source.root, capture_output=True, check=True, timeout=60).stdout
    files = [source.root / name for name in listed.decode().split("\0") if name]
    texts = [file for file in files if file.is_file() and file.suffix not in _DATA_SUFFIXES and file != Path(__file__)]
    assert len(texts) > 100
    found = {
        str(file): places for file in texts if (places := _places(file.read_text(encoding="utf-8", errors="ignore")))
    }
    assert found == {}


@pytest.mark.parametrize("text", ["see /home/anna/model", "cd /Users/anna", ".".join(["https://pypi", "org/simple"])])
def test_a_place_is_found(text: str) -> None:
    assert _places(text) != []


@pytest.mark.parametrize("text", ["~/models", "$HOME/home/x", "https://www.apache.org/licenses/", "/proc/self/fd"])
def test_what_every_machine_has_is_no_place(text: str) -> None:
    assert _places(text) == []
