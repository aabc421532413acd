from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from eagleray.engine.execution.host_memory import available_host_bytes

MIB = 2**20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A machine with 1000 MiB available, in the control group /a/b."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 1\nMemAvailable:  {1000 * 1024} kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/a/b\n")
    return tmp_path / "proc"


def write_group(folder: Path, limit: str, used: int, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive_file}\n")


def test_without_a_limit_the_machine_counts(proc: Path, tmp_path: Path) -> None:
    write_group(tmp_path / "groups" / "a", "max", 5)
    assert available_host_bytes(proc, tmp_path / "groups") == 1000 * MIB


@pytest.mark.parametrize("group", ["", "a", "a/b"])
def test_the_tightest_group_around_the_process_counts(proc: Path, tmp_path: Path, group: str) -> None:
    for folder in ("", "a", "a/b"):
        limit = 300 * MIB if folder == group else 900 * MIB
        write_group(tmp_path / "groups" / folder, str(limit), 100 * MIB)
    assert available_host_bytes(proc, tmp_path / "groups") == 200 * MIB


def test_cached_files_of_a_group_can_be_had(proc: Path, tmp_path: Path) -> None:
    write_group(tmp_path / "groups" / "a", str(300 * MIB), 250 * MIB, inactive_file=40 * MIB)
    assert available_host_bytes(proc, tmp_path / "groups") == 90 * MIB


def test_a_group_over_its_limit_leaves_nothing(proc: Path, tmp_path: Path) -> None:
    write_group(tmp_path / "groups" / "a", str(10 * MIB), 20 * MIB)
    assert available_host_bytes(proc, tmp_path / "groups") == 0


def test_the_first_version_of_control_groups_counts_too(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("4:cpu,memory:/a\n3:cpuset:/x\n")
    folder = tmp_path / "groups" / "memory" / "a"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(50 * MIB))
    (folder / "memory.usage_in_bytes").write_text(str(20 * MIB))
    assert available_host_bytes(proc, tmp_path / "groups") == 30 * MIB


def test_nothing_is_known_where_nothing_tells(tmp_path: Path) -> None:
    assert available_host_bytes(tmp_path, tmp_path) is None


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_was_freed_and_kept_is_given_back_when_it_is_asked_for() -> None:
    script = """
import resource
from eagleray.engine.execution.host_memory import give_back_freed_memory, keep_freed_memory
def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
keep_freed_memory()
buffers = [bytearray(2**20) for _ in range(64)]
peak = resident_mib()
del buffers
kept = resident_mib()
give_back_freed_memory()
assert peak - kept < 8, (peak, kept)
assert kept - resident_mib() > 48, (kept, resident_mib())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
