"""Who used the cores: the tree that is timed, or somebody else."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from interference import OtherProcesses

# Prints a line once it has used half a second of processor time, and stays until its input ends.
_BUSY = "import sys, time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\nsys.stdin.read()"
_PARENT_OF_A_BUSY_ONE = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {_BUSY!r}])"
_IDLE = "import sys\nsys.stdin.read()"


def _start(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize("program", [_BUSY, _PARENT_OF_A_BUSY_ONE], ids=["itself", "its child"])
def test_what_a_timed_tree_uses_is_not_what_others_use(program: str):
    with _start(program) as busy, _start(_IDLE) as idle:
        start_s = time.perf_counter()
        busy_is_timed, idle_is_timed = OtherProcesses(busy.pid), OtherProcesses(idle.pid)
        assert busy.stdout.readline() == b"\n"
        others_of_busy, others_of_idle = busy_is_timed.share(), idle_is_timed.share()
        all_cores_s = (time.perf_counter() - start_s) * (os.cpu_count() or 1)
        for process in (busy, idle):
            process.communicate(timeout=10)
    assert (others_of_idle - others_of_busy) * all_cores_s > 0.25
