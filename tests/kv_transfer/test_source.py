"""A source on its own, against a reader that the test plays on a real connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from eagleray.core.clock import ManualClock, SystemClock
from eagleray.core.config import TransferConfig
from eagleray.core.errors import ConfigError, TransferError
from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.kv_transfer.fake import Calls, MemoryBlockStore
from eagleray.kv_transfer.fingerprint import PORTABLE_BLOCK_OPS, fingerprint
from eagleray.kv_transfer.link import Link
from eagleray.kv_transfer.reactor import Next
from eagleray.kv_transfer.session import LAST_WORDS_S, SourceLedger, SourceProgress
from eagleray.kv_transfer.source import KVSource
from eagleray.kv_transfer.source_connection import ReaderConnection, SourceState
from eagleray.kv_transfer.wire import Announcement, BlockBytes, Heartbeat, ReadBlocks, Release, Subscribe, encode_frame

LAYOUT = KVLayout(4, (LayerGroup("target", 2, 2, 16, "float32"),))  # blocks of 2048 bytes
CONFIG = TransferConfig(lease_s=30.0, stall_deadline_s=5.0, piece_bytes=4096)


@dataclass
class Bench:
    source: KVSource
    store: MemoryBlockStore
    clock: ManualClock
    released: Calls[str]
    links: list[Link]

    def connect(self, subscription: Subscribe | None = None) -> Link:
        link = Link.connect(self.source.region.address, SystemClock(), 5.0, "source")
        self.links.append(link)
        link.send(subscription or Subscribe("r", 1, LAYOUT.digest(), 0))
        return link

    def announce(self, *block_ids: int, num_tokens: int, is_last: bool = False) -> None:
        self.source.announce("r", SourceProgress(block_ids, num_tokens, is_last, (7,) if is_last else ()))


@pytest.fixture
def bench() -> Iterator[Bench]:
    store, clock, released = MemoryBlockStore(LAYOUT, 16), ManualClock(), Calls[str]()
    for block_id in range(16):
        store.fill(block_id, f"block {block_id}")
    source = KVSource(store.region("w"), store, clock, CONFIG, released)
    bench = Bench(source, store, clock, released, [])
    yield bench
    source.stop()
    for link in bench.links:
        link.close()


def next_announcement(link: Link) -> Announcement:
    frame = link.wait_for(Announcement)
    assert isinstance(frame, Announcement)
    return frame


def test_it_listens_on_a_port_of_its_own(bench: Bench) -> None:
    host, port = bench.source.region.address.split(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


def test_an_address_that_is_not_ours_is_refused_at_start() -> None:
    store = MemoryBlockStore(LAYOUT, 2)
    with pytest.raises(ConfigError, match=r"region\.address='203\.0\.113\.1:0'"):
        KVSource(store.region("w", address="203.0.113.1:0"), store, ManualClock(), CONFIG, Calls())


def test_announcements_name_each_full_block_with_its_fingerprint(bench: Bench) -> None:
    bench.source.open("r")
    link = bench.connect()
    bench.announce(9, 3, num_tokens=6)
    announcement = next_announcement(link)
    assert [(notice.index, notice.slot) for notice in announcement.blocks] == [(0, 9)]
    assert announcement.blocks[0].fingerprint == fingerprint(LAYOUT.digest(), bench.store.block_views(9))
    assert (announcement.is_last, announcement.token_ids) == (False, ())
    bench.announce(9, 3, num_tokens=7, is_last=True)
    announcement = next_announcement(link)
    assert [(notice.index, notice.slot) for notice in announcement.blocks] == [(1, 3)]
    assert (announcement.is_last, announcement.token_ids, announcement.num_tokens) == (True, (7,), 7)


def test_a_long_prefix_is_announced_piece_by_piece(bench: Bench) -> None:
    bench.source.open("r")
    bench.announce(0, 1, 2, 3, 4, num_tokens=20, is_last=True)
    link = bench.connect()
    announcements = [next_announcement(link) for _ in range(3)]
    assert [len(announcement.blocks) for announcement in announcements] == [2, 2, 1]
    assert [announcement.is_last for announcement in announcements] == [False, False, True]


def test_a_reader_that_subscribes_before_the_request_is_opened_gets_everything(bench: Bench) -> None:
    link = bench.connect()
    bench.source.open("r")
    bench.announce(9, num_tokens=4, is_last=True)
    assert next_announcement(link).is_last


def test_bytes_are_sent_as_asked_for(bench: Bench) -> None:
    bench.source.open("r")
    bench.announce(9, 3, num_tokens=8, is_last=True)
    link = bench.connect()
    next_announcement(link)
    link.send(ReadBlocks((3, 9)))
    target = bytearray(2 * LAYOUT.block_bytes)
    assert link.wait_for(BlockBytes) == BlockBytes(len(target))
    link.receive_into([memoryview(target)])
    assert bytes(target) == bench.store.content(3) + bench.store.content(9)


def test_a_release_lets_the_lease_go(bench: Bench) -> None:
    bench.source.open("r")
    bench.announce(9, num_tokens=4, is_last=True)
    link = bench.connect()
    next_announcement(link)
    assert not bench.released.values
    link.send(Release())
    assert bench.released.wait() == ["r"]


@pytest.mark.parametrize("is_last", [False, True])
def test_a_reader_that_goes_away_lets_the_lease_go(bench: Bench, is_last: bool) -> None:
    bench.source.open("r")
    bench.announce(9, num_tokens=4, is_last=is_last)
    link = bench.connect()
    next_announcement(link)
    link.close()
    assert bench.released.wait() == ["r"]


@pytest.mark.parametrize(
    ("subscription", "words"),
    [
        (Subscribe("r", 2, LAYOUT.digest(), 0), "epoch 2 of the ticket is not epoch 1"),
        (Subscribe("r", 1, "other", 0), "layout other of the reader"),
        (Subscribe("r", 1, LAYOUT.digest(), -1), "first_block=-1"),
    ],
)
def test_a_wrong_ticket_is_refused_and_the_lease_stays(bench: Bench, subscription: Subscribe, words: str) -> None:
    bench.source.open("r")
    assert words in next_announcement(bench.connect(subscription)).error
    bench.announce(9, num_tokens=4, is_last=True)
    assert next_announcement(bench.connect()).is_last


def test_blocks_of_others_are_not_sent(bench: Bench) -> None:
    bench.source.open("r")
    bench.announce(9, num_tokens=4)
    link = bench.connect()
    next_announcement(link)
    link.send(ReadBlocks((9, 10)))
    assert "not announced" in next_announcement(link).error


def test_garbage_ends_its_connection_and_nothing_else(bench: Bench) -> None:
    bench.source.open("r")
    link = bench.connect()
    link._socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert "frame length" in next_announcement(link).error
    assert bench.released.wait() == ["r"]
    bench.source.open("r2")
    bench.source.announce("r2", SourceProgress((1,), 4, True))
    assert next_announcement(bench.connect(Subscribe("r2", 1, LAYOUT.digest(), 0))).is_last


def test_closing_tells_the_reader_why(bench: Bench) -> None:
    bench.source.open("r")
    link = bench.connect()
    bench.announce(9, num_tokens=4)
    next_announcement(link)
    bench.source.close("r", "prefill failed: out of memory")
    assert next_announcement(link).error == "prefill failed: out of memory"
    assert bench.released.wait() == ["r"]
    with pytest.raises(TransferError, match="closed the connection"):
        link.wait_for(Announcement)


def test_closing_without_a_reader_releases_at_once(bench: Bench) -> None:
    bench.source.open("r")
    bench.source.close("r", "aborted")
    assert bench.released.wait() == ["r"]
    assert next_announcement(bench.connect()).error == "aborted"


def test_a_lease_that_nobody_fetches_ends_at_its_deadline(bench: Bench) -> None:
    bench.source.open("r")
    bench.announce(9, num_tokens=4, is_last=True)
    bench.clock.advance(29.9)
    bench.source.expire()
    bench.source.open("other")
    bench.source.close("other", "aborted")
    assert bench.released.wait() == ["other"], "the lease has not ended yet"
    bench.clock.advance(0.1)
    bench.source.expire()
    assert bench.released.wait(2) == ["other", "r"]


def test_a_reader_that_stops_reading_is_told_and_cut_off_at_the_deadline(bench: Bench) -> None:
    bench.source.open("r")
    bench.announce(9, num_tokens=4, is_last=True)
    link = bench.connect()
    next_announcement(link)
    bench.clock.advance(30.0)
    bench.source.expire()
    assert next_announcement(link).error == "the reader made no progress for lease_s=30"
    assert bench.released.wait() == ["r"]


def test_a_reader_that_takes_no_bytes_does_not_delay_the_others(bench: Bench) -> None:
    bench.source.open("r")
    bench.announce(9, num_tokens=4)
    stuck = bench.connect()
    next_announcement(stuck)
    for _ in range(20):
        stuck.send(ReadBlocks((9,) * 1000))  # 40 MB that are never received
    for n in range(CONFIG.num_threads + 1):
        bench.source.open(f"r{n}")
        bench.source.announce(f"r{n}", SourceProgress((1,), 4, True))
        assert next_announcement(bench.connect(Subscribe(f"r{n}", 1, LAYOUT.digest(), 0))).is_last
    bench.source.close("r", "aborted")
    bench.clock.advance(LAST_WORDS_S)
    assert bench.released.wait(1, timeout_s=1.0) == ["r"]


def test_a_reader_in_the_middle_of_its_bytes_gets_them_and_then_the_reason(bench: Bench) -> None:
    bench.source.open("r")
    bench.announce(9, num_tokens=4)
    link = bench.connect()
    next_announcement(link)
    slots = (9,) * 8000  # 16 MB: more than the socket takes at once
    link.send(ReadBlocks(slots))
    assert link.wait_for(BlockBytes) == BlockBytes(len(slots) * LAYOUT.block_bytes)
    bench.source.close("r", "finished here")
    target = [memoryview(bytearray(LAYOUT.block_bytes)) for _ in slots]
    link.receive_into(target)
    assert all(view == bench.store.content(9) for view in target)
    assert next_announcement(link).error == "finished here"
    assert bench.released.wait() == ["r"]


def test_a_first_reader_that_gave_up_does_not_take_the_second_one_along() -> None:
    ledger = SourceLedger(1, LAYOUT.digest(), LAYOUT.block_size_tokens, CONFIG.lease_s)
    store, clock = MemoryBlockStore(LAYOUT, 2), ManualClock()
    state = SourceState(ledger, store, clock, CONFIG, LAYOUT.digest(), LAYOUT.block_bytes, PORTABLE_BLOCK_OPS)
    pairs = [socket.socketpair() for _ in range(2)]
    first, second = (ReaderConnection(state, Link(ours, clock, 5.0, "reader")) for ours, _ in pairs)
    for _, theirs in pairs:
        theirs.sendall(encode_frame(Subscribe("r", 1, LAYOUT.digest(), 0)))
    assert first.serve(may_take_long=False) is Next.WAIT
    ledger.close("r", "gave up waiting for it", 0.0)
    ledger.open("r")
    assert second.serve(may_take_long=False) is Next.WAIT
    first.finish()
    assert state.readers == {"r": second}
    second.finish()
    assert ledger.take_released() == ["r"]
    for _, theirs in pairs:
        theirs.close()


@pytest.mark.parametrize(("num_blocks", "following"), [(100, Next.WAIT), (200, Next.WORK)])
def test_many_fingerprints_are_left_to_who_may_take_long(num_blocks: int, following: Next) -> None:
    ledger = SourceLedger(1, LAYOUT.digest(), LAYOUT.block_size_tokens, CONFIG.lease_s)
    store, clock = MemoryBlockStore(LAYOUT, 1), ManualClock()
    state = SourceState(ledger, store, clock, CONFIG, LAYOUT.digest(), LAYOUT.block_bytes, PORTABLE_BLOCK_OPS)
    ours, theirs = socket.socketpair()
    reader, link = ReaderConnection(state, Link(ours, clock, 5.0, "reader")), Link(theirs, SystemClock(), 5.0, "source")
    link.send(Subscribe("r", 1, LAYOUT.digest(), 0))
    assert reader.serve(may_take_long=False) is Next.WAIT
    ledger.open("r")
    ledger.announce("r", SourceProgress((0,) * num_blocks, num_blocks * LAYOUT.block_size_tokens, True, (7,)), 0.0)
    assert reader.serve(may_take_long=False) is following
    assert reader.serve(may_take_long=True) is Next.WAIT
    told = 0
    while told < num_blocks:
        told += len(next_announcement(link).blocks)
    reader.finish()
    link.close()


def test_a_silent_source_shows_signs_of_life(bench: Bench) -> None:
    bench.source.open("r")
    bench.announce(9, num_tokens=4)
    link = bench.connect()
    next_announcement(link)
    bench.clock.advance(CONFIG.stall_deadline_s / 2)
    bench.source.expire()
    assert link.wait_for(Heartbeat) == Heartbeat()


def test_a_connection_that_never_subscribes_is_closed(bench: Bench) -> None:
    link = Link.connect(bench.source.region.address, SystemClock(), 5.0, "source")
    bench.links.append(link)
    link.queue(Subscribe("r", 1, LAYOUT.digest(), 0))  # queued, never sent
    bench.clock.advance(CONFIG.stall_deadline_s + 0.1)
    accepted = bench.connect()  # the listener has been served, so that the first one was accepted too
    bench.source.open("r")
    bench.announce(9, num_tokens=4, is_last=True)
    next_announcement(accepted)
    bench.clock.advance(CONFIG.stall_deadline_s + 0.1)
    with pytest.raises(TransferError, match="closed the connection"):
        link.wait_for(Announcement)


def test_a_callback_that_fails_does_not_take_the_others_along() -> None:
    store, released = MemoryBlockStore(LAYOUT, 2), Calls[str]()

    def on_released(request_id: str) -> None:
        if request_id == "bad":
            raise RuntimeError("a bug of the worker")
        released(request_id)

    source = KVSource(store.region("w"), store, ManualClock(), CONFIG, on_released)
    for request_id in ("bad", "good"):
        source.open(request_id)
        source.close(request_id, "aborted")
    assert released.wait() == ["good"]
    source.stop()


def test_stopping_releases_everything_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    store, released = MemoryBlockStore(LAYOUT, 2), Calls[str]()
    source = KVSource(store.region("w"), store, ManualClock(), CONFIG, released)
    source.open("read")
    source.open("waiting")
    link = Link.connect(source.region.address, SystemClock(), 5.0, "source")
    link.send(Subscribe("read", 1, LAYOUT.digest(), 0))
    source.announce("read", SourceProgress((1,), 4))
    next_announcement(link)
    source.stop()
    assert sorted(released.values) == ["read", "waiting"]
    assert next_announcement(link).error == "the source is stopping"
    assert set(threading.enumerate()) == before
    link.close()
