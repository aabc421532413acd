from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no Linux")


def run(script: str, *arguments: str) -> None:
    """In a process of its own, whose libraries are nobody else's."""
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=120)


def test_code_that_only_the_start_has_used_is_given_back_and_comes_back_when_it_is_used() -> None:
    run("""
import resource
import torch
from eagleray.engine.execution.library_pages import give_back_library_pages
def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
loaded = resident_mib()
give_back_library_pages()
given_back = resident_mib()
assert loaded - given_back > 30, (loaded, given_back)
assert torch.equal(torch.eye(64) @ torch.full((64, 64), 2.0), torch.full((64, 64), 2.0))
assert given_back < resident_mib() < loaded, (given_back, resident_mib(), loaded)
""")


def test_code_that_was_changed_in_memory_stays(tmp_path: Path) -> None:
    """As a debugger leaves it. What shares nothing with it goes."""
    (tmp_path / "changed é").write_bytes(b"a" * 8192)
    (tmp_path / "as it was").write_bytes(b"a" * 8192)
    run(
        """
import ctypes, mmap, sys
from eagleray.engine.execution.library_pages import give_back_library_pages
def map_code(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
def resident_kib(path):
    lines = open("/proc/self/smaps").read().split(path)[1].splitlines()
    return int(next(line for line in lines if line.startswith("Rss")).split()[1])
mappings = [map_code(path) for path in sys.argv[1:]]
mappings[0][5000] = ord("b")
assert mappings[1][5000] == mappings[1][0] == ord("a")
for code in mappings:
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), 8192, mmap.PROT_READ | mmap.PROT_EXEC) == 0
assert resident_kib(sys.argv[2]) > 0
give_back_library_pages()
assert mappings[0][5000] == ord("b")
assert resident_kib(sys.argv[2]) == 0
assert mappings[1][5000] == ord("a")
""",
        str(tmp_path / "changed é"),
        str(tmp_path / "as it was"),
    )


def test_nothing_happens_where_the_system_does_not_tell(tmp_path: Path) -> None:
    run(
        "import sys, pathlib\n"
        "from eagleray.engine.execution.library_pages import give_back_library_pages\n"
        "give_back_library_pages(pathlib.Path(sys.argv[1]))",
        str(tmp_path),
    )
