from __future__ import annotations

import mmap

import pytest

from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.engine.execution.kv_memory import KVMemory
from tests.support.mappings import mapped_kib

LAYOUT = KVLayout(16, (LayerGroup("target", 4, 2, 64, "float32"),))


def test_pages_of_a_shared_pool_are_there_before_anything_is_handed_over() -> None:
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(23)
    except OSError:
        pytest.skip("this system does not provide pages ahead")
    memory = KVMemory(LAYOUT, num_blocks=100, shared=True)
    reference = memory.shared_memory_ref()
    assert reference is not None
    assert mapped_kib(reference.fd)["Rss"] * 1024 >= 100 * LAYOUT.block_bytes
    assert not any(memory.block_views(99)[0])
    memory.close()
