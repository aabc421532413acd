"""The table of configuration keys in the operations page is the one that core/config.py gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eagleray.core.config import Config


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("configuration_table", root / "scripts" / "configuration_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script: ModuleType, page: Any) -> None:
    text = page["docs/operations.md"].text
    written = script.replace_between_marks(text, script.render_tables())
    assert written == text, "core/config.py has changed: run scripts/configuration_table.py"


def test_the_table_has_every_key_with_its_default(script: ModuleType) -> None:
    tables = script.render_tables()
    for key in Config.model_fields:
        assert f"`{key}." in tables or f"`{key}`" in tables
    assert "| `router.stall_deadline_s` | `10.0` | number ≥ 2 |" in tables
    assert "| `model.max_model_tokens` | `null` | integer ≥ 1 or null |" in tables
    assert "`decode.*`: the same keys and defaults as `prefill.*`." in tables


def test_a_page_without_the_marks_is_an_error(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="substring not found"):
        script.replace_between_marks("# Operations\n", "")
