"""What processes used, as Linux tells it in /proc."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

_PROC: Final = Path("/proc")
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class ProcessUse(msgspec.Struct, frozen=True):
    """Of one process with all its threads, since it began or between two readings."""

    cpu_s: float  # user and system; in steps of a clock tick, 10 ms
    num_waits: int  # voluntary context switches of the threads that live: how often one of them went to sleep

    def since(self, earlier: ProcessUse) -> ProcessUse:
        return ProcessUse(self.cpu_s - earlier.cpu_s, self.num_waits - earlier.num_waits)


def read_use(pid: int) -> ProcessUse:
    """Raises ``FileNotFoundError`` for a process that is gone."""
    fields = stat_fields(pid)
    user_ticks, system_ticks = int(fields[11]), int(fields[12])  # fields 14 and 15 of proc(5)
    waits = (_num_waits(task) for task in (_PROC / str(pid) / "task").iterdir())
    return ProcessUse((user_ticks + system_ticks) / TICKS_PER_S, sum(waits))


def thread_times_s(pid: int) -> dict[int, float]:
    """User and system time of every thread of ``pid`` and of all processes below it, in steps of a clock tick."""
    times_s = {}
    for process in (pid, *descendants(pid)):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            for task in (_PROC / str(process) / "task").iterdir():
                user_ticks, system_ticks = _fields_of(task)[11:13]
                times_s[int(task.name)] = (int(user_ticks) + int(system_ticks)) / TICKS_PER_S
    return times_s


def has_loaded(pid: int, library: str) -> bool:
    """Whether ``pid`` or a process below it has a file of such a name in its memory."""
    return any(library in _maps(process) for process in (pid, *descendants(pid)))


def share_in_huge_pages(pid: int, name: str) -> float | None:
    """Of what ``pid`` has in memory of mapped files with ``name`` in their paths; None if that is nothing."""
    fields = mapped_bytes(smaps_of(pid), name)
    return fields["FilePmdMapped"] / fields["Rss"] if fields["Rss"] else None


def smaps_of(pid: int) -> str:
    """Raises ``FileNotFoundError`` or ``ProcessLookupError`` for a process that is gone."""
    return (_PROC / str(pid) / "smaps").read_text(encoding="utf-8", errors="replace")


def mapped_bytes(smaps: str, name: str) -> Counter[str]:
    """Sums over all mappings whose line has ``name`` in it, by the fields of proc_pid_smaps(5)."""
    total: Counter[str] = Counter()
    is_meant = False
    for line in smaps.splitlines():
        first, *rest = line.split(maxsplit=2)
        if not first.endswith(":"):
            is_meant = name in line
        elif is_meant and rest[-1:] == ["kB"]:
            total[first.removesuffix(":")] += int(rest[0]) * 1024
    return total


def _maps(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "maps").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""  # it has just ended


def descendants(pid: int) -> dict[int, str]:
    """Every process below ``pid``: its id, and the title that it goes by."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found, left = {}, children.get(pid, [])
    while left:
        child = left.pop()
        found[child] = _title(child)
        left.extend(children.get(child, ()))
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                yield int(entry.name), int(stat_fields(int(entry.name))[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended


def stat_fields(pid: int) -> list[str]:
    """From the third on."""
    return _fields_of(_PROC / str(pid))


def _fields_of(process_or_thread: Path) -> list[str]:
    """From the third on: the second, the name, may hold blanks and brackets."""
    return (process_or_thread / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def _num_waits(task: Path) -> int:
    try:
        status = (task / "status").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0  # the thread has just ended
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("voluntary_ctxt_switches"))


def _title(pid: int) -> str:
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return words[0] if words[0].startswith("ray::") else " ".join(words[:2]).strip()
