"""Every link of the pages leads somewhere, and every path that they name exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)", re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"[A-Za-z_][\w.-]*(?:/[\w.-]+)*/|[A-Za-z_][\w.-]*(?:/[\w.-]+)+|[\w.-]+\.(?:py|toml|txt)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _broken_links(path: Path, text: str) -> list[str]:
    links = [link for link in _LINK.findall(text) if not link.startswith(("https://", "http://"))]
    return [link for link in links if not _resolves(path, link)]


def _resolves(path: Path, link: str) -> bool:
    target, _, anchor = link.partition("#")
    file = path.parent / target if target else path
    if not anchor or not file.exists():
        return file.exists()
    return anchor in map(_anchor, _HEADING.findall(file.read_text(encoding="utf-8")))


def _missing_paths(root: Path, names: list[str]) -> list[str]:
    return [name for name in names if _PATH.fullmatch(name) and not _is_in_a_clone(root / name)]


def _is_in_a_clone(path: Path) -> bool:
    """An empty folder is not."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def test_every_internal_link_resolves_to_a_file_and_a_heading(pages: Any) -> None:
    assert {page.name: broken for page in pages if (broken := _broken_links(page.path, page.prose))} == {}


def test_every_path_named_in_prose_exists(root: Path, pages: Any) -> None:
    assert {p.name: missing for p in pages if (missing := _missing_paths(root, _CODE.findall(p.prose)))} == {}


def test_every_path_named_in_a_command_exists(root: Path, pages: Any) -> None:
    words = {
        word.strip('"')
        for page in pages
        for block in page.blocks("bash")
        for line in block.text.splitlines()
        for word in re.split(r"[ =]", line.partition(" #")[0])
        if not word.startswith(("~", "/", "http", "application/"))
    }
    assert _missing_paths(root, sorted(words)) == []


def test_every_page_in_docs_is_reached_from_the_readme(root: Path, pages: Any) -> None:
    def targets(path: Path) -> set[Path]:
        links = _LINK.findall(path.read_text(encoding="utf-8"))
        return {(path.parent / link.partition("#")[0]).resolve() for link in links if not link.startswith("http")}

    reached, new = set(), {root / "README.md"}
    while new:
        reached |= new
        new = {target for path in new for target in targets(path) if target.suffix == ".md"} - reached
    assert {page.path for page in pages} - reached == set()


@pytest.mark.parametrize("text", ["[a](nowhere.md)", "[a](README.md#no-such-heading)", "[a](#nor-here)"])
def test_a_broken_link_is_found(root: Path, text: str) -> None:
    assert len(_broken_links(root / "README.md", f"# Title\n{text}")) == 1


@pytest.mark.parametrize("name", ["core/nothing.py", "nowhere/", "nothing.py"])
def test_a_missing_path_is_found(root: Path, name: str) -> None:
    assert _missing_paths(root, [name]) == [name]
