"""How much of the cores somebody else used while something was timed. Linux only: it reads ``/proc``."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")


class OtherProcesses:
    """From its construction on: all processes but this one and those of one tree, which is what is timed."""

    def __init__(self, tree_pid: int) -> None:
        self._tree_pid = tree_pid
        self._start_s = time.perf_counter()
        self._busy_s, self._own_s = _busy_s(), self._measured_s()

    def share(self) -> float:
        """Of the time of all cores, what others used; what a hypervisor took away counts as theirs."""
        others_s = (_busy_s() - self._busy_s) - (self._measured_s() - self._own_s)
        return max(0.0, others_s / ((time.perf_counter() - self._start_s) * (os.cpu_count() or 1)))

    def _measured_s(self) -> float:
        return time.process_time() + _tree_s(self._tree_pid)


def _busy_s() -> float:
    """Of all cores, since the machine started: user, nice, system, interrupts and stolen time."""
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(
        int, (_PROC / "stat").read_text(encoding="ascii").split()[1:9]
    )
    return (user + nice + system + sum(interrupts_and_stolen)) / _TICKS_PER_S


def _tree_s(root: int) -> float:
    """Time of a process and of all below it, also of those that ended and were waited for."""
    children: dict[int, list[int]] = defaultdict(list)
    used_s: dict[int, float] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:  # it has just ended
                continue
            # After the command, which may contain anything, in parentheses: state, parent, ... (proc_pid_stat(5)).
            fields = stat.rpartition(")")[2].split()
            children[int(fields[1])].append(int(entry.name))
            used_s[int(entry.name)] = sum(map(int, fields[11:15])) / _TICKS_PER_S
    pending, total_s = [root], 0.0
    while pending:
        pid = pending.pop()
        total_s += used_s.get(pid, 0.0)
        pending += children[pid]
    return total_s
