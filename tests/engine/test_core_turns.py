"""Taking turns on shared cores: between real processes, also when one of them dies or stands still."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from eagleray.engine.execution.core_turns import SharedCores, count_cores

LONG_S = 60.0  # nobody waits so long
WORKER = """
import sys
from pathlib import Path
from eagleray.engine.execution.core_turns import SharedCores

turns = SharedCores(Path(sys.argv[1]), float(sys.argv[2]))
for _ in sys.stdin:
    with turns.turn():
        print(turns.num_without_turn, flush=True)
        sys.stdin.readline()
"""


class Worker:
    """A process that takes turns when it is told to."""

    def __init__(self, folder: Path, deadline_s: float = LONG_S) -> None:
        command = [sys.executable, "-c", WORKER, str(folder), str(deadline_s)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def enter(self) -> None:
        self._say()

    def leave(self) -> None:
        self._say()

    def entered(self) -> int:
        """Waits until it computes; how many steps it has begun without a turn."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def _say(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def new_worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def new(deadline_s: float = LONG_S) -> Worker:
        workers.append(Worker(tmp_path, deadline_s))
        return workers[-1]

    yield new
    for worker in workers:
        worker.process.kill()
        worker.process.communicate()


@pytest.fixture
def wait_for_one_who_waits(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Looks at the turnstile from outside."""
    next_file = os.open(tmp_path / "next", os.O_RDWR | os.O_CREAT)

    def wait() -> None:
        deadline_s = time.monotonic() + LONG_S
        while time.monotonic() < deadline_s:
            try:
                fcntl.flock(next_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            fcntl.flock(next_file, fcntl.LOCK_UN)
            os.sched_yield()
        raise AssertionError("nobody waits")

    yield wait
    os.close(next_file)


def test_two_workers_alternate_strictly(
    new_worker: Callable[..., Worker], wait_for_one_who_waits: Callable[[], None]
) -> None:
    computing, waiting = new_worker(), new_worker()
    computing.enter()
    assert computing.entered() == 0
    waiting.enter()
    for _ in range(10):
        wait_for_one_who_waits()
        computing.leave()
        computing.enter()  # at once: the other one goes first all the same
        assert waiting.entered() == 0
        computing, waiting = waiting, computing


def test_a_worker_that_is_killed_in_its_turn_gives_it_back(
    new_worker: Callable[..., Worker], wait_for_one_who_waits: Callable[[], None]
) -> None:
    killed, other = new_worker(), new_worker()
    killed.enter()
    killed.entered()
    other.enter()
    wait_for_one_who_waits()
    killed.process.kill()
    assert other.entered() == 0


def test_a_worker_that_is_killed_while_it_waits_is_in_nobodys_way(
    new_worker: Callable[..., Worker], wait_for_one_who_waits: Callable[[], None]
) -> None:
    computing, killed, other = new_worker(), new_worker(), new_worker()
    computing.enter()
    computing.entered()
    killed.enter()
    wait_for_one_who_waits()
    other.enter()
    killed.process.kill()
    computing.leave()
    assert other.entered() == 0


def test_a_worker_that_stands_still_in_its_turn_delays_others_once_until_it_goes_on(
    new_worker: Callable[..., Worker],
) -> None:
    stopped, other = new_worker(), new_worker(deadline_s=0.1)
    stopped.enter()
    stopped.entered()
    stopped.process.send_signal(signal.SIGSTOP)
    for expected in (1, 2, 3):
        other.enter()
        assert other.entered() == expected
        other.leave()
    stopped.process.send_signal(signal.SIGCONT)
    stopped.leave()
    deadline_s, before, num_without_turn = time.monotonic() + LONG_S, 0, 3
    while num_without_turn != before:
        assert time.monotonic() < deadline_s
        other.enter()
        before, num_without_turn = num_without_turn, other.entered()
        other.leave()


def test_the_first_step_without_a_turn_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    computing, other = SharedCores(tmp_path, LONG_S), SharedCores(tmp_path, 0.01)
    with computing.turn():
        for _ in range(3):
            with other.turn():
                pass
    assert len(caplog.records) == 1 and "engine.step_deadline_s" in caplog.text
    assert other.num_without_turn == 3
    computing.close()
    other.close()


def test_who_has_to_wait_says_so_before(tmp_path: Path) -> None:
    computing, other = SharedCores(tmp_path, LONG_S), SharedCores(tmp_path, 0.01)
    said: list[int] = []
    with computing.turn(), other.turn(on_wait=lambda: said.append(other.num_without_turn)):
        pass
    assert said == [0] and other.num_without_turn == 1
    computing.close()
    other.close()


def test_a_worker_alone_waits_for_nobody(tmp_path: Path) -> None:
    turns, said = SharedCores(tmp_path, deadline_s=0.0), list[bool]()
    for _ in range(100):
        with turns.turn(on_wait=lambda: said.append(True)):
            pass
    assert said == []
    assert turns.num_without_turn == 0
    turns.close()


def test_a_step_that_fails_ends_its_turn(tmp_path: Path) -> None:
    failing, other = SharedCores(tmp_path, LONG_S), SharedCores(tmp_path, deadline_s=0.0)
    with pytest.raises(ZeroDivisionError), failing.turn():
        raise ZeroDivisionError
    with other.turn():
        assert other.num_without_turn == 0
    failing.close()
    other.close()


def test_a_worker_that_closes_within_its_turn_keeps_it_to_the_end(tmp_path: Path) -> None:
    closing, other = SharedCores(tmp_path, LONG_S), SharedCores(tmp_path, deadline_s=0.05)
    with closing.turn():
        closing.close()
        with other.turn():
            assert other.num_without_turn == 1
    other.close()


def test_who_passes_a_turn_on_ends_the_threads_that_helped_it(
    tmp_path: Path, new_worker: Callable[..., Worker], wait_for_one_who_waits: Callable[[], None]
) -> None:
    turns, waiting = SharedCores(tmp_path, LONG_S), new_worker()
    torch.set_num_threads(2)
    with turns.turn():
        num_before = _num_threads()
        torch.ones(2_000_000).exp_()
        assert _num_threads() > num_before
        waiting.enter()
        wait_for_one_who_waits()
    assert _num_threads() <= num_before
    assert waiting.entered() == 0
    turns.close()


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"}, 1),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_cores_are_no_more_than_the_control_group_has_time_for(
    tmp_path: Path, files: dict[str, str], most: int | None
) -> None:
    line, folder = (
        ("0::/pod", tmp_path / "groups" / "pod")
        if "cpu.max" in files
        else ("4:cpu,cpuacct:/", tmp_path / "groups" / "cpu")
    )
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(line + "\n")
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    assert count_cores(tmp_path, tmp_path / "groups") == (most or len(os.sched_getaffinity(0)))
