"""The control groups that this process is in: what a container may have of its machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
CONTROL_GROUPS: Final = Path("/sys/fs/cgroup")


def own_groups(controller: str, proc: Path = PROC, control_groups: Path = CONTROL_GROUPS) -> Iterator[Path]:
    """The folders of the process's own group and of all above it, of both versions of control groups; those of the
    first have files for ``controller`` alone."""
    for line in lines_of(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root = control_groups
        elif controller in controllers.split(","):
            root = control_groups / controller
        else:
            continue
        # In a container the path may be the host's, which does not exist here: then its own group is the root.
        yield from (root, *(root.joinpath(*parts) for parts in _prefixes(path)))


def lines_of(path: Path) -> list[str]:
    """None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _prefixes(path: str) -> Iterator[tuple[str, ...]]:
    parts = [part for part in path.split("/") if part]
    for count in range(1, len(parts) + 1):
        yield tuple(parts[:count])
