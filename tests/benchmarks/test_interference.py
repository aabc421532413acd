"""Who used the cores: the tree that is timed, or somebody else."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import interference
import pytest
from interference import OtherProcesses, Trees, attempts, undisturbed

# Once told to, prints a line when it has used half a second of processor time, and stays until its input ends.
_BUSY = (
    "import sys, time\nsys.stdin.readline()\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\nsys.stdin.read()"
)
_PARENT_OF_A_BUSY_ONE = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {_BUSY!r}])"
_IDLE = "import sys\nsys.stdin.read()"


def _start(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _wait_until_it_was_busy(process: subprocess.Popen[bytes]) -> None:
    """Not before it was told: what is measured has begun by then, however late this process had its turn."""
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"\n"


@pytest.mark.parametrize("program", [_BUSY, _PARENT_OF_A_BUSY_ONE], ids=["itself", "its child"])
def test_what_a_timed_tree_uses_is_not_what_others_use(program: str):
    with _start(program) as busy, _start(_IDLE) as idle:
        start_s = time.perf_counter()
        busy_is_timed, idle_is_timed = OtherProcesses(busy.pid), OtherProcesses(idle.pid)
        _wait_until_it_was_busy(busy)
        others_of_busy, others_of_idle = busy_is_timed.share(), idle_is_timed.share()
        all_cores_s = (time.perf_counter() - start_s) * (os.cpu_count() or 1)
        for process in (busy, idle):
            process.communicate(timeout=10)
    assert (others_of_idle - others_of_busy) * all_cores_s > 0.25


def test_what_all_that_this_process_has_started_uses_is_not_what_others_use() -> None:
    with _start(_PARENT_OF_A_BUSY_ONE) as busy:
        start_s = time.perf_counter()
        everything, this_one = OtherProcesses(os.getpid()), OtherProcesses()
        _wait_until_it_was_busy(busy)
        all_cores_s = (time.perf_counter() - start_s) * (os.cpu_count() or 1)
        shares = this_one.share(), everything.share()
        busy.communicate(timeout=10)
    assert (shares[0] - shares[1]) * all_cores_s > 0.25


def test_idle_trees_use_nothing_and_busy_ones_something():
    with _start(_PARENT_OF_A_BUSY_ONE) as busy, _start(_IDLE) as idle:
        start_s = time.perf_counter()
        of_busy, of_idle = Trees([busy.pid]), Trees([idle.pid])
        _wait_until_it_was_busy(busy)
        shares = of_busy.share(), of_idle.share()
        all_cores_s = (time.perf_counter() - start_s) * (os.cpu_count() or 1)
        for process in (busy, idle):
            process.communicate(timeout=10)
    assert (shares[0] - shares[1]) * all_cores_s > 0.25


class _Others:
    """Others that use these shares of the cores, one in each attempt."""

    def __init__(self, *shares: float) -> None:
        self.left = list(shares)

    def __call__(self, tree_pid: int | None) -> _Others:
        return self

    def share(self) -> float:
        return self.left.pop(0)


def test_a_timing_that_others_disturb_is_tried_three_times_at_most(monkeypatch: pytest.MonkeyPatch):
    others = _Others(0.5, 0.4, 0.3, 0.0)
    monkeypatch.setattr(interference, "OtherProcesses", others)
    timings = iter(("first", "second", "third"))
    assert undisturbed(lambda: next(timings), max_share=0.06) == ("third", 0.3)
    assert others.left == [0.0]


def test_the_first_attempt_that_others_leave_alone_is_the_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interference, "OtherProcesses", _Others(0.5, 0.06, 0.5))
    assert [attempt.end() for attempt in attempts(max_share=0.06)] == [0.5, 0.06]
