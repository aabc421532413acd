"""The pages that users read, and what is in them: links, code blocks, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
_BLOCK: Final = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block."""

    page: str
    language: str
    text: str  # without the indentation of the list it may stand in


@dataclass(frozen=True)
class Page:
    path: Path
    text: str

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def prose(self) -> str:
        """Without code blocks."""
        return _BLOCK.sub("", self.text)

    def blocks(self, language: str) -> Iterator[Block]:
        for indent, found, text in _BLOCK.findall(self.text):
            if found == language:
                yield Block(self.name, found, "\n".join(line.removeprefix(indent) for line in text.splitlines()))

    def section(self, heading: str) -> str:
        """The text below ``heading``, up to the next one of its level."""
        level = heading.split()[0]
        return re.split(rf"^{level} ", self.text.split(f"{heading}\n")[1], flags=re.MULTILINE)[0]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def pages() -> list[Page]:
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [Page(path, path.read_text(encoding="utf-8")) for path in paths]


@pytest.fixture(scope="session")
def page(pages: list[Page]) -> dict[str, Page]:
    """By path relative to the repository root."""
    return {each.name: each for each in pages}
