from __future__ import annotations

from pathlib import Path

import pytest

from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.kv_transfer.fake import MemoryBlockStore
from eagleray.kv_transfer.fingerprint import PORTABLE_BLOCK_OPS
from eagleray.workers.block_ops import select_block_ops

LAYOUT = KVLayout(4, (LayerGroup("target", 3, 2, 16, "float32"), LayerGroup("draft", 1, 2, 16, "bfloat16")))


def test_both_implementations_copy_alike_and_agree_on_the_fingerprint() -> None:
    selected, digest = select_block_ops("auto", LAYOUT), LAYOUT.digest()
    store = MemoryBlockStore(LAYOUT, 3)
    store.fill(0, "block 0")
    fingerprints = {
        PORTABLE_BLOCK_OPS.copy(digest, store.block_views(0), store.block_views(1)),
        selected.copy(digest, store.block_views(0), store.block_views(2)),
        PORTABLE_BLOCK_OPS.fingerprint(digest, store.block_views(0)),
        selected.fingerprint(digest, store.block_views(0)),
    }
    assert len(fingerprints) == 1
    assert store.content(0) == store.content(1) == store.content(2)


def test_without_the_native_library_there_is_the_portable_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert select_block_ops("torch", LAYOUT) is PORTABLE_BLOCK_OPS
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert select_block_ops("auto", LAYOUT) is PORTABLE_BLOCK_OPS


def test_blocks_that_are_too_short_for_the_native_library_go_the_portable_way() -> None:
    assert select_block_ops("auto", KVLayout(1, (LayerGroup("t", 1, 1, 2, "float32"),))) is PORTABLE_BLOCK_OPS
