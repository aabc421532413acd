"""When memory of another process can be read, and when it must not be."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from eagleray.core.clock import SystemClock
from eagleray.core.errors import TransferError, TransportUnavailable
from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.core.kv_region import KVRegion, SharedMemoryRef
from eagleray.kv_transfer.fake import MemoryBlockStore
from eagleray.kv_transfer.link import Link
from eagleray.kv_transfer.transports.shared_memory import SharedMemoryTransport

LAYOUT = KVLayout(4, (LayerGroup("target", 2, 2, 16, "float32"),))


@pytest.fixture
def link() -> Iterator[Link]:
    left, right = socket.socketpair()
    link = Link(left, SystemClock(), 1.0, "source")
    yield link
    link.close()
    right.close()


@pytest.fixture
def store() -> Iterator[MemoryBlockStore]:
    store = MemoryBlockStore(LAYOUT, 4, shared=True)
    yield store
    store.close()


def with_reference(region: KVRegion, **changes: object) -> KVRegion:
    assert region.shared_memory is not None
    reference: SharedMemoryRef = msgspec.structs.replace(region.shared_memory, **changes)
    return msgspec.structs.replace(region, shared_memory=reference)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host_id": "elsewhere"}, "runs on another host"),
        ({"pid": 2**22 + 1}, "cannot be opened"),
        ({"num_bytes": 4096}, "its size is not 4096 bytes"),
        ({"cookie": b"of another pool.."}, "the pid was reused"),
    ],
)
def test_a_reference_that_is_not_this_pool_is_unavailable_in_words(
    store: MemoryBlockStore, link: Link, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(TransportUnavailable, match=words):
        SharedMemoryTransport().open(with_reference(store.region("w"), **changes), link)


def test_a_descriptor_that_now_belongs_to_another_file_is_unavailable(store: MemoryBlockStore, link: Link) -> None:
    region = store.region("w")
    assert region.shared_memory is not None
    other = MemoryBlockStore(LAYOUT, 4, shared=True)
    reference = other.region("w").shared_memory
    assert reference is not None
    with pytest.raises(TransportUnavailable, match="pid was reused"):
        SharedMemoryTransport().open(with_reference(region, fd=reference.fd), link)
    other.close()


def test_a_block_outside_of_the_file_is_an_error_and_not_a_crash(store: MemoryBlockStore, link: Link) -> None:
    reader = SharedMemoryTransport().open(store.region("w"), link)
    target = MemoryBlockStore(LAYOUT, 1)
    for slot in (4, -1):
        with pytest.raises(TransferError, match=f"block {slot} lies outside"):
            reader.read([slot], [target.block_views(0)], lambda: False)


def test_a_new_incarnation_replaces_the_mapping_of_the_old_one(store: MemoryBlockStore, link: Link) -> None:
    transport = SharedMemoryTransport()
    newer = MemoryBlockStore(LAYOUT, 4, shared=True)
    newer.fill(2, "newer")
    transport.open(store.region("w"), link).close()
    target = MemoryBlockStore(LAYOUT, 1)
    transport.open(newer.region("w", epoch=2), link).read([2], [target.block_views(0)], lambda: False)
    assert target.content(0) == newer.content(2)
    newer.close()


def test_the_mapping_of_a_source_that_has_gone_is_dropped_at_the_next_pull(store: MemoryBlockStore, link: Link) -> None:
    transport = SharedMemoryTransport()
    gone = MemoryBlockStore(LAYOUT, 8, shared=True)
    transport.open(gone.region("gone"), link).close()
    gone.close()
    transport.open(store.region("w"), link).close()
    assert list(transport._mappings) == ["w"]
