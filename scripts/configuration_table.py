"""Writes the tables of configuration keys in docs/operations.md from ``core/config.py``.

Run it after a change there: ``.venv/bin/python scripts/configuration_table.py``. A test compares the page with its
tables, so a key cannot change without its page.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from eagleray.core.config import Config
from eagleray.core.config_sections import section_of

PAGE: Final = Path(__file__).resolve().parent.parent / "docs" / "operations.md"
BEGIN: Final = "<!-- configuration: written by scripts/configuration_table.py -->"
END: Final = "<!-- end of configuration -->"
_BOUNDS: Final = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


def render_tables() -> str:
    """All sections of ``Config`` as Markdown; a section that another one repeats is named instead of repeated."""
    return "\n".join(_sections(Config, "", {})).strip() + "\n"


def replace_between_marks(page: str, tables: str) -> str:
    """``page`` with ``tables`` between the two marks. Raises ``ValueError`` where a mark is missing."""
    before, rest = page[: page.index(BEGIN)], page[page.index(END) :]
    return f"{before}{BEGIN}\n{tables}{rest}"


def _sections(model: type[BaseModel], prefix: str, seen: dict[type[BaseModel], str]) -> Iterator[str]:
    nested: list[tuple[str, type[BaseModel]]] = []
    rows: list[str] = []
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            nested.append((prefix + name, section))
        else:
            rows.append(f"| `{prefix}{name}` | {_default(field)} | {_allowed(field)} | {field.description or ''} |")
    if rows:
        yield from ("", "| key | default | allowed | meaning |", "| --- | --- | --- | --- |", *rows)
    for name, section in nested:
        if section in seen:
            yield from ("", f"`{name}.*`: the same keys and defaults as `{seen[section]}.*`.")
        else:
            seen[section] = name
            yield from _sections(section, f"{name}.", seen)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(must be set)"
    return f"`{json.dumps(field.default)}`"


def _allowed(field: FieldInfo) -> str:
    bounds = [
        text.format(getattr(bound, name))
        for bound in field.metadata
        for name, text in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    values, or_null, nothing = _type_name(field.annotation).partition(" or null")
    return f"{values} {' and '.join(bounds)}".strip() + or_null + nothing


def _type_name(annotation: Any) -> str:
    """In the words of YAML: ``integer or null``, ``list of ...``, or the values themselves."""
    arguments = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Literal:
            return ", ".join(f"`{value}`" for value in arguments)
        case origin if origin in (Union, types.UnionType):
            return " or ".join(map(_type_name, arguments))
        case origin if origin is tuple:
            return f"list of {_type_name(arguments[0])}"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
    return {**names, ByteSize: "size such as `6GiB`"}[annotation]


if __name__ == "__main__":
    PAGE.write_text(replace_between_marks(PAGE.read_text(encoding="utf-8"), render_tables()), encoding="utf-8")
