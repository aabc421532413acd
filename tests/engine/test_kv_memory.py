from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.engine.execution.kv_memory import KVMemory

LAYOUT = KVLayout(16, (LayerGroup("target", 4, 2, 64, "float32"),))


def kibibytes_in_memory(fd: int) -> int:
    """Of the mapping of ``fd`` in this process, as the system counts it."""
    inode, resident, is_ours = os.fstat(fd).st_ino, 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        name, *fields = line.split()
        if not name.endswith(":"):
            is_ours = int(fields[3]) == inode
        elif name == "Rss:" and is_ours:
            resident += int(fields[0])
    return resident


def test_pages_of_a_shared_pool_are_there_before_anything_is_handed_over() -> None:
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(23)
    except OSError:
        pytest.skip("this system does not provide pages ahead")
    memory = KVMemory(LAYOUT, num_blocks=100, shared=True)
    reference = memory.shared_memory_ref()
    assert reference is not None
    assert kibibytes_in_memory(reference.fd) * 1024 >= 100 * LAYOUT.block_bytes
    assert not any(memory.block_views(99)[0])
    memory.close()
