"""The sections of a configuration and the fields in them, as pydantic describes them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Location = tuple[int | str, ...]  # of a field or section: the keys that lead to it


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, or may hold."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def fields_below(top: type[BaseModel], location: Location) -> dict[str, FieldInfo]:
    """Of the section at that place, by key; none where no section is."""
    section = top
    for part in location:
        below = section_of(section.model_fields[str(part)])
        if below is None:
            return {}
        section = below
    return dict(section.model_fields)


def choices_of(field: FieldInfo) -> list[str]:
    """The values that there are for a field; none where they are not listed."""
    return [str(value) for value in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []


def alike_key(top: type[BaseModel], location: Location) -> str | None:
    """Which key was perhaps meant by one that does not exist: of that name further down, or of nearly that name."""
    *above, name = map(str, location)
    here = fields_below(top, tuple(above))
    below = [".".join((*above, section, name)) for section in here if name in fields_below(top, (*above, section))]
    return " or ".join(below) or next(iter(get_close_matches(name, here, n=1)), None)
