"""Whose turn it is to compute, where workers share the cores of a machine.

Two workers whose steps compute at the same time, each with a thread on every core, wait for each other's threads at
every operation; with half of the cores each, one waits idle while the other has too much to do. Taking turns, each step
has all cores.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Final, Protocol

from eagleray.engine.execution.control_groups import CONTROL_GROUPS, PROC, lines_of, own_groups
from eagleray.kernels.helper_threads import end_helper_threads

_logger: Final = logging.getLogger(__name__)


def _nothing() -> None:
    pass


class CoreTurns(Protocol):
    """Lets a worker compute when it may. Used by one thread."""

    def turn(self, on_wait: Callable[[], None] = _nothing) -> AbstractContextManager[None]:
        """Entered when the cores are there for a step; left when it is over. ``on_wait`` is called before they are
        waited for, if they are not there at once."""
        ...

    def close(self) -> None:
        """Nobody computes any more."""
        ...


class OwnCores:
    """Of a worker that shares with nobody: it is always its turn."""

    def turn(self, on_wait: Callable[[], None] = _nothing) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        pass


class SharedCores:
    """A turnstile for all who were given the same folder, made of locks on two files: the kernel gives them back when a
    process dies, however it dies.

    Whoever has ``next`` goes as soon as ``cores`` is free. A worker that has just computed finds ``next`` taken by who
    waits: two workers alternate strictly. Without another one that wants to compute, a turn costs microseconds.
    """

    def __init__(self, folder: Path, deadline_s: float) -> None:
        """``deadline_s``: who waits longer computes without a turn, because the one that has it is stuck."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._next = os.open(folder / "next", os.O_RDWR | os.O_CREAT, 0o600)
        self._cores = os.open(folder / "cores", os.O_RDWR | os.O_CREAT, 0o600)
        self._deadline_s = deadline_s
        self.num_without_turn = 0  # steps that did not wait for it to the end
        # Waiting for a lock has no deadline: a thread of its own does it.
        self._asked: SimpleQueue[Future[None] | None] = SimpleQueue()
        self._has_waited = threading.Event()
        self._has_waited.set()
        threading.Thread(target=self._wait_for_turns, name="core-turns", daemon=True).start()

    @contextmanager
    def turn(self, on_wait: Callable[[], None] = _nothing) -> Iterator[None]:
        has_turn = self._take_now()
        if not has_turn:
            on_wait()
            has_turn = self._wait()
        try:
            yield
        finally:
            if has_turn:
                self._pass_on()

    def close(self) -> None:
        """The files stay open as long as the process: a step that nobody waits for may still be in its turn."""
        self._asked.put(None)

    def _take_now(self) -> bool:
        """Whether nobody else computes or waits. Otherwise what was free of the two files stays ours."""
        if not self._has_waited.is_set():  # the thread still waits, for a turn that came too late
            return False
        try:
            fcntl.flock(self._next, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(self._cores, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._next, fcntl.LOCK_UN)
        return True

    def _wait(self) -> bool:
        """Whether the turn came in time."""
        if self._has_waited.is_set():
            self._has_waited.clear()
            asked: Future[None] = Future()
            self._asked.put(asked)
            try:
                asked.result(self._deadline_s)
                return True
            except TimeoutError:
                if not asked.cancel():  # it has just come
                    return True
        if not self.num_without_turn:
            _logger.warning(
                "other workers of this machine have kept the cores for more than %g s, a quarter of "
                "engine.step_deadline_s: this one computes beside them; set cores: own if that goes on",
                self._deadline_s,
            )
        self.num_without_turn += 1
        return False

    def _wait_for_turns(self) -> None:
        while (asked := self._asked.get()) is not None:
            fcntl.flock(self._next, fcntl.LOCK_EX)
            fcntl.flock(self._cores, fcntl.LOCK_EX)
            fcntl.flock(self._next, fcntl.LOCK_UN)
            is_wanted = asked.set_running_or_notify_cancel()
            if not is_wanted:
                fcntl.flock(self._cores, fcntl.LOCK_UN)
            self._has_waited.set()
            if is_wanted:
                asked.set_result(None)

    def _pass_on(self) -> None:
        try:
            fcntl.flock(self._next, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(self._next, fcntl.LOCK_UN)
        except BlockingIOError:  # somebody waits
            end_helper_threads()
        fcntl.flock(self._cores, fcntl.LOCK_UN)


def count_cores(proc: Path = PROC, control_groups: Path = CONTROL_GROUPS) -> int:
    """Those that this process may use: by its affinity, or as many as the tightest control group around it gives time
    of, whichever is less."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in own_groups("cpu", proc, control_groups):
        # Microseconds of time in so many, of the second version of control groups and of the first.
        limits = " ".join(lines_of(folder / "cpu.max")).split() or [
            line for name in ("quota", "period") for line in lines_of(folder / f"cpu.cfs_{name}_us")
        ]
        if len(limits) == 2 and limits[0] not in ("max", "-1"):
            num_cores = min(num_cores, max(1, int(limits[0]) // int(limits[1])))
    return num_cores
