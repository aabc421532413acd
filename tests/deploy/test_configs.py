"""Every configuration that we ship is one that we accept."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagleray.core.config import load_config

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "configs"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_configuration_is_accepted_and_says_how_to_use_it(path: Path) -> None:
    load_config(path)
    assert f"eagleray serve deploy/configs/{path.name}" in path.read_text(encoding="utf-8")


def test_there_are_configurations_and_the_page_lists_each() -> None:
    page = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in FOLDER.glob("*.yaml")]
    assert names and all(f"(configs/{name})" in page for name in names)
