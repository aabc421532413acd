"""Python and the packages that eagleray says it needs. Uses the standard library only: any of them may be missing."""

from __future__ import annotations

import operator
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Final, NamedTuple

from eagleray import __version__
from eagleray.cli.finding import Finding, Level

OPTIONAL: Final = {
    "local": "a Redis-protocol server for machines without one",
    "otlp": "traces to an OpenTelemetry collector",
}
# A line of a package's metadata, such as: redis[hiredis]>=6; extra == "local"
_REQUIREMENT: Final = re.compile(r"""([\w.-]+)(?:\[[^]]*\])?\s*([^;]*)(?:;.*extra == ['"](\w+))?""")
_BOUND: Final = re.compile(r"(>=|<|==)\s*([\w.]+)")


class Requirement(NamedTuple):
    name: str
    bounds: str  # such as ">=2.60,<2.61"
    extra: str | None

    @classmethod
    def parse(cls, line: str) -> Requirement:
        match = _REQUIREMENT.match(line)
        if match is None:
            raise ValueError(f"{line!r} is not a requirement")
        return cls(match[1], match[2].strip(), match[3])


def check_software() -> list[Finding]:
    python = Finding(Level.OK, "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    return [python, Finding(Level.OK, "eagleray", __version__), *_check_requirements()]


def _check_requirements() -> Iterator[Finding]:
    try:
        lines = metadata.requires("eagleray") or []
    except metadata.PackageNotFoundError:
        yield Finding(Level.WARN, "packages", "eagleray is not installed, only found", "pip install -e .")
        return
    for requirement in map(Requirement.parse, lines):
        if requirement.extra is None:
            yield _check_needed(requirement)
        elif requirement.extra in OPTIONAL:
            yield _check_optional(requirement)


def _check_needed(requirement: Requirement) -> Finding:
    install = f"pip install '{requirement.name}{requirement.bounds}'"
    version = _version(requirement.name)
    if version is None:
        return Finding(Level.MISSING, requirement.name, "is not installed", install)
    if not satisfies(version, requirement.bounds):
        text = f"{version} does not fit: {requirement.bounds} is needed"
        return Finding(Level.MISSING, requirement.name, text, install)
    return Finding(Level.OK, requirement.name, version)


def _check_optional(requirement: Requirement) -> Finding:
    version = _version(requirement.name)
    if version is not None:
        return Finding(Level.OK, requirement.name, version)
    purpose = OPTIONAL[requirement.extra or ""]
    text = f"is not installed; only needed for {purpose} (pip install 'eagleray[{requirement.extra}]')"
    return Finding(Level.OK, requirement.name, text)


def satisfies(version: str, bounds: str) -> bool:
    """Whether ``version`` lies within bounds of the kinds that we write (>=, <, ==), by its numbers."""
    holds = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
    return all(holds[sign](_numbers(version), _numbers(bound)) for sign, bound in _BOUND.findall(bounds))


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
