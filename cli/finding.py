"""What ``eagleray doctor`` finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    OK = "ok"
    WARN = "warn"  # works, but less well than it could
    MISSING = "missing"  # does not work without


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, what it is like, and what to do about it unless it is well."""

    level: Level
    name: str
    text: str
    way_out: str = ""
