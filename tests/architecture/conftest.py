"""The source tree as the architecture tests see it: every module of the packages, parsed once."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Module:
    """One Python file."""

    path: str  # relative to the repository root
    tree: ast.Module
    num_lines: int


@dataclass(frozen=True)
class SourceTree:
    root: Path
    setuptools: dict[str, Any]  # pyproject's [tool.setuptools]
    project: dict[str, Any]  # pyproject's [project]
    library: tuple[Module, ...]  # the modules of the packages
    programs: tuple[Module, ...]  # examples, benchmarks and scripts

    @property
    def package_folders(self) -> dict[str, str]:
        """Dotted name of every listed package -> its folder, relative to the root."""
        top_folders: dict[str, str] = self.setuptools["package-dir"]
        folders = {}
        for package in self.setuptools["packages"]:
            owner = max((top for top in top_folders if f"{package}.".startswith(f"{top}.")), key=len)
            folders[package] = "/".join([top_folders[owner], *package[len(owner) :].split(".")[1:]])
        return folders


def _module(path: str, text: str) -> Module:
    return Module(path, ast.parse(text), text.count("\n"))


def _parsed(folder: Path) -> list[Module]:
    files = sorted(folder.rglob("*.py"))
    return [_module(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


@pytest.fixture(scope="session")
def source() -> SourceTree:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = pyproject["tool"]["setuptools"]
    return SourceTree(
        root=ROOT,
        setuptools=setuptools,
        project=pyproject["project"],
        library=tuple(module for folder in setuptools["package-dir"].values() for module in _parsed(ROOT / folder)),
        programs=tuple(module for folder in ("benchmarks", "examples", "scripts") for module in _parsed(ROOT / folder)),
    )


@pytest.fixture
def module_of() -> Callable[[str], Module]:
    """A module from its text, for planting what a check must find."""
    return lambda text: _module("planted/module.py", text)
