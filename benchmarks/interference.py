"""How much of the cores somebody else used while something was timed, as Linux tells it in /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final, TypeVar

from process_cpu import TICKS_PER_S, descendants, stat_fields

MAX_OTHERS_SHARE: Final = 0.06  # of the cores; where others used more, a timing says little
_ATTEMPTS: Final = 3

Result = TypeVar("Result")


class OtherProcesses:
    """From its construction on: all processes but this one and, when one is given, those of the tree that is timed, be
    it all that this one has started."""

    def __init__(self, tree_pid: int | None = None) -> None:
        self._tree_pid = tree_pid
        self._start_s = time.perf_counter()
        self._busy_s, self._own_s = _busy_s(), self._measured_s()

    def share(self) -> float:
        """Of the time of all cores, what others used; what a hypervisor took away counts as theirs."""
        others_s = (_busy_s() - self._busy_s) - (self._measured_s() - self._own_s)
        return _share_of_cores(others_s, self._start_s)

    def _measured_s(self) -> float:
        tree_s = 0.0 if self._tree_pid is None else _tree_s(self._tree_pid)
        return tree_s if self._tree_pid == os.getpid() else time.process_time() + tree_s


class Trees:
    """From its construction on: processes and all below them."""

    def __init__(self, pids: Collection[int]) -> None:
        self._pids, self._start_s = pids, time.perf_counter()
        self._before_s = self._used_s()

    def share(self) -> float:
        """Of the time of all cores, what they used."""
        return _share_of_cores(self._used_s() - self._before_s, self._start_s)

    def _used_s(self) -> float:
        return sum(map(_tree_s, self._pids))


class Attempt:
    """One attempt at a timing, which begins with it."""

    def __init__(self, tree_pid: int | None) -> None:
        self._others = OtherProcesses(tree_pid)
        self.others_share: float | None = None  # once it has ended

    def end(self) -> float:
        """What is timed is over: the share of the cores that others used meanwhile."""
        self.others_share = self._others.share()
        return self.others_share


def attempts(max_share: float, tree_pid: int | None = None) -> Iterator[Attempt]:
    """Up to three, until others leave one alone. The body of the loop times something and ends the attempt."""
    for _ in range(_ATTEMPTS):
        attempt = Attempt(tree_pid)
        yield attempt
        if attempt.others_share is not None and attempt.others_share <= max_share:
            return


def undisturbed(
    action: Callable[[], Result], max_share: float = MAX_OTHERS_SHARE, tree_pid: int | None = None
) -> tuple[Result, float]:
    """What ``action`` returns and what others used meanwhile, of the first attempt that they left alone or the last."""
    for attempt in attempts(max_share, tree_pid):
        result = action()
        others_share = attempt.end()
    return result, others_share


def mark(others_share: float) -> str:
    """Behind what was timed meanwhile, wherever it is shown."""
    return " (disturbed)" if others_share > MAX_OTHERS_SHARE else ""


def _share_of_cores(used_s: float, start_s: float) -> float:
    return max(0.0, used_s / ((time.perf_counter() - start_s) * (os.cpu_count() or 1)))


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
