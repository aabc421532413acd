"""How much of the cores somebody else used while something was timed, as Linux tells it in /proc."""

from __future__ import annotations

import os
import time
from pathlib import Path

from process_cpu import TICKS_PER_S, descendants, stat_fields


class OtherProcesses:
    """From its construction on: all processes but this one and, when one is given, those of the tree that is timed."""

    def __init__(self, tree_pid: int | None = None) -> None:
        self._tree_pid = tree_pid
        self._start_s = time.perf_counter()
        self._busy_s, self._own_s = _busy_s(), self._measured_s()

    def share(self) -> float:
        """Of the time of all cores, what others used; what a hypervisor took away counts as theirs."""
        others_s = (_busy_s() - self._busy_s) - (self._measured_s() - self._own_s)
        return max(0.0, others_s / ((time.perf_counter() - self._start_s) * (os.cpu_count() or 1)))

    def _measured_s(self) -> float:
        tree_s = 0.0 if self._tree_pid is None else _tree_s(self._tree_pid)
        return time.process_time() + tree_s


def _busy_s() -> float:
    """Of all cores, since the machine started: user, nice, system, interrupts and stolen time."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split()[1:9]
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, fields)
    return (user + nice + system + sum(interrupts_and_stolen)) / TICKS_PER_S


def _tree_s(root: int) -> float:
    """Time of a process and of all below it, also of those that ended and were waited for."""
    ticks = 0
    for pid in (root, *descendants(root)):
        try:
            ticks += sum(map(int, stat_fields(pid)[11:15]))  # fields 14 to 17 of proc(5)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return ticks / TICKS_PER_S
