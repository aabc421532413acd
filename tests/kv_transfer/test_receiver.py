"""A receiver on its own, against a source that the test plays on a real connection."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from eagleray.core.clock import ManualClock, SystemClock
from eagleray.core.config import TransferConfig
from eagleray.core.errors import TransferError
from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.core.kv_region import KVRegion
from eagleray.kv_transfer.fake import Calls, MemoryBlockStore
from eagleray.kv_transfer.fingerprint import fingerprint
from eagleray.kv_transfer.link import Link
from eagleray.kv_transfer.pull import PullResult
from eagleray.kv_transfer.receiver import KVReceiver
from eagleray.kv_transfer.transport import Transport
from eagleray.kv_transfer.transports.loopback import Fault, LoopbackTransport, corrupt_at, cut_at, no_fault
from eagleray.kv_transfer.transports.shared_memory import SharedMemoryTransport
from eagleray.kv_transfer.transports.tcp import TcpTransport
from eagleray.kv_transfer.wire import (
    Announcement,
    BlockBytes,
    BlockNotice,
    ReadBlocks,
    Received,
    Release,
    Subscribe,
)

LAYOUT = KVLayout(4, (LayerGroup("target", 2, 2, 16, "float32"),))  # blocks of 2048 bytes
CONFIG = TransferConfig(stall_deadline_s=5.0, piece_bytes=4096, num_threads=2)


class PlayedSource:
    """A listening socket whose connections the test answers by hand; the blocks lie in this process."""

    def __init__(self) -> None:
        self.store = MemoryBlockStore(LAYOUT, 16)
        for block_id in range(16):
            self.store.fill(block_id, f"block {block_id}")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10.0)
        self._links: list[Link] = []
        self.region: KVRegion = self.store.region("w", address=f"127.0.0.1:{self._listener.getsockname()[1]}")

    def accept(self) -> Link:
        sock, _ = self._listener.accept()
        link = Link(sock, SystemClock(), 5.0, "reader")
        self._links.append(link)
        return link

    def notices(self, *slots: int, first: int = 0) -> tuple[BlockNotice, ...]:
        digests = [fingerprint(LAYOUT.digest(), self.store.block_views(slot)) for slot in slots]
        return tuple(BlockNotice(first + n, slot, digests[n]) for n, slot in enumerate(slots))

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._listener.close()


class Bench:
    def __init__(self) -> None:
        self.played = PlayedSource()
        self.store = MemoryBlockStore(LAYOUT, 16)
        self.done: Calls[PullResult] = Calls()
        self.receivers: list[KVReceiver] = []

    def receiver(
        self,
        transports: Sequence[Transport] | None = None,
        config: TransferConfig = CONFIG,
        clock: SystemClock | ManualClock | None = None,
        fault: Fault = no_fault,
    ) -> KVReceiver:
        chosen = transports or [LoopbackTransport({"w": self.played.store}, fault)]
        receiver = KVReceiver(LAYOUT, self.store, clock or SystemClock(), config, chosen)
        self.receivers.append(receiver)
        return receiver

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.stop()
        self.played.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_it_presents_its_ticket_and_releases_when_all_is_in(bench: Bench) -> None:
    bench.receiver().pull("r", bench.played.region, 2, [5, 6], bench.done)
    link = bench.played.accept()
    assert link.wait_for(Subscribe) == Subscribe("r", 1, LAYOUT.digest(), 2)
    link.send(Announcement("r", bench.played.notices(9, 3, first=2), 15, True, (7,)))
    assert link.wait_for(Release) == Release()
    [result] = bench.done.wait()
    assert (result.complete, result.num_verified_blocks, result.num_tokens, result.token_ids) == (True, 2, 15, (7,))
    assert bench.store.content(6) == bench.played.store.content(3)


@pytest.mark.parametrize(
    ("fault", "verified", "words"),
    [
        (corrupt_at(8), 1, "block 1 arrived with fingerprint"),
        (cut_at(8), 0, "cut at block 8"),
        (cut_at(7), 2, "cut at"),
    ],
)
def test_a_fault_is_reported_and_nothing_after_it_counts(bench: Bench, fault: Fault, verified: int, words: str) -> None:
    bench.receiver(fault=fault).pull("r", bench.played.region, 0, [1, 2, 3, 4], bench.done)
    bench.played.accept().send(Announcement("r", bench.played.notices(9, 8, 7, 6), 16, True, (5,)))
    [result] = bench.done.wait()
    assert (result.complete, result.cancelled, result.num_verified_blocks) == (False, False, verified)
    assert result.num_tokens == verified * 4
    assert words in result.reason


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (Announcement("r", error="prefill failed"), "prefill failed"),
        (Announcement("other"), "announcement of request other"),
        (Release(), "a Release frame out of place"),
    ],
)
def test_what_the_source_says_wrong_ends_the_pull_in_words(
    bench: Bench, frame: Announcement | Release, words: str
) -> None:
    bench.receiver().pull("r", bench.played.region, 0, [1], bench.done)
    bench.played.accept().send(frame)
    [result] = bench.done.wait()
    assert not result.complete
    assert words in result.reason


@pytest.mark.parametrize("is_last", [False, True])
def test_blocks_announced_before_the_source_hung_up_are_still_used(bench: Bench, is_last: bool) -> None:
    bench.receiver().pull("r", bench.played.region, 0, [1, 2, 3, 4, 5], bench.done)
    link = bench.played.accept()
    link.wait_for(Subscribe)
    link.send(Announcement("r", bench.played.notices(9, 8, 7, 6, 5), 20, is_last, (7,)))
    link.close()
    [result] = bench.done.wait()
    assert (result.complete, result.num_verified_blocks) == (is_last, 5)
    assert result.num_tokens == 20
    assert is_last or "connection" in result.reason


def test_the_reason_of_the_source_outlives_its_connection_and_is_given_word_for_word(bench: Bench) -> None:
    bench.receiver([TcpTransport()]).pull("r", bench.played.region, 0, [1], bench.done)
    link = bench.played.accept()
    link.send(Announcement("r", bench.played.notices(9), 4))
    link.wait_for(ReadBlocks)
    link.send(Announcement("r", error="finished at its source"))  # instead of the bytes
    link.close()
    assert bench.done.wait()[0].reason == "finished at its source"


def test_a_source_that_is_not_there_ends_the_pull(bench: Bench) -> None:
    bench.played._listener.close()
    bench.receiver().pull("r", bench.played.region, 0, [1], bench.done)
    assert "Connection refused" in bench.done.wait()[0].reason


def test_layouts_that_differ_are_refused_with_both_values(bench: Bench) -> None:
    other = msgspec.structs.replace(LAYOUT, block_size_tokens=8)
    source = msgspec.structs.replace(bench.played.region, layout=other)
    bench.receiver().pull("r", source, 0, [1], bench.done)
    assert "block_size_tokens 4 here, 8 there" in bench.done.wait()[0].reason


def test_a_busy_source_is_waited_for_and_a_silent_one_is_not(bench: Bench) -> None:
    clock = ManualClock()
    bench.receiver(clock=clock).pull("r", bench.played.region, 0, [1, 2, 3, 4], bench.done)
    link = bench.played.accept()
    for n in range(3):
        clock.advance(CONFIG.stall_deadline_s - 0.1)
        link.send(Announcement("r", bench.played.notices(9, first=n), 4 * (n + 1)))
        assert link.wait_for(Received) == Received(n + 1)
    while not bench.done.values:
        clock.advance(CONFIG.stall_deadline_s)
        with contextlib.suppress(TimeoutError):
            bench.done.wait(timeout_s=0.2)
    [result] = bench.done.values
    assert result.num_verified_blocks == 3
    assert "no sign of life for stall_deadline_s=5" in result.reason


def test_progress_is_reported_when_the_lease_needs_it_and_not_with_every_piece(bench: Bench) -> None:
    clock = ManualClock()
    bench.receiver(clock=clock).pull("r", bench.played.region, 0, range(8), bench.done)
    link = bench.played.accept()
    link.wait_for(Subscribe)
    clock.advance(CONFIG.lease_s / 8)
    link.send(Announcement("r", bench.played.notices(*range(8)), 32, is_last=True, token_ids=(7,)))
    assert link.wait_for(Release) == Release()
    assert link.poll_frame() == Received(2)  # after the first of four pieces
    with pytest.raises(TransferError, match="closed"):  # it ends without another one
        link.wait_for(Received)


def test_stopped_sources_hold_up_the_others_no_longer_than_the_deadline(bench: Bench) -> None:
    config = TransferConfig(stall_deadline_s=0.3, num_threads=2)
    receiver = bench.receiver([TcpTransport()], config)
    stuck: Calls[PullResult] = Calls()
    for n in range(2):  # as many as there are threads: both promise bytes and send none
        receiver.pull(f"stuck {n}", bench.played.region, 0, [n], stuck)
        link = bench.played.accept()
        link.send(Announcement(f"stuck {n}", bench.played.notices(9), 4, True))
        link.wait_for(ReadBlocks)
    receiver.pull("r", bench.played.region, 0, [5], bench.done)
    link = bench.played.accept()
    link.send(Announcement("r", bench.played.notices(8), 4, True))
    results = stuck.wait(2)
    assert all("no progress for stall_deadline_s=0.3" in result.reason for result in results)
    link.wait_for(ReadBlocks)
    link.queue(BlockBytes(LAYOUT.block_bytes), bench.played.store.block_views(8))
    assert link.flush()
    assert bench.done.wait()[0].complete


def test_pulls_that_wait_cost_no_thread_and_all_are_served(bench: Bench) -> None:
    receiver = bench.receiver()
    links = {}
    for n in range(8):  # more than there are threads
        receiver.pull(f"r{n}", bench.played.region, 0, [n], bench.done)
        links[n] = bench.played.accept()
    for n in reversed(range(8)):
        links[n].send(Announcement(f"r{n}", bench.played.notices(n), 4, True))
    assert sorted(result.request_id for result in bench.done.wait(8) if result.complete) == [f"r{n}" for n in range(8)]


def test_it_says_quiet_only_when_nothing_writes_any_more(bench: Bench) -> None:
    copying, go_on = threading.Event(), threading.Event()

    def hold(slot: int, views: Sequence[memoryview]) -> None:
        copying.set()
        go_on.wait(10.0)

    receiver = bench.receiver(fault=hold)
    receiver.pull("r", bench.played.region, 0, [1, 2], bench.done)
    bench.played.accept().send(Announcement("r", bench.played.notices(9, 8), 8, True))
    assert copying.wait(10.0)
    receiver.cancel("r")
    with pytest.raises(TimeoutError):
        bench.done.wait(timeout_s=0.2)
    go_on.set()
    [result] = bench.done.wait()
    assert (result.cancelled, result.num_verified_blocks, result.reason) == (True, 0, "cancelled")
    assert bench.store.content(2) == bytes(LAYOUT.block_bytes), "the second block was begun after the cancel"


def test_bytes_that_come_after_a_cancel_land_nowhere(bench: Bench) -> None:
    receiver = bench.receiver([TcpTransport()])
    receiver.pull("r", bench.played.region, 0, [1], bench.done)
    link = bench.played.accept()
    link.send(Announcement("r", bench.played.notices(9), 4, True))
    link.wait_for(ReadBlocks)
    [block] = bench.played.store.block_views(9)
    link.queue(BlockBytes(len(block)), [block[:1000]])
    assert link.flush()
    receiver.cancel("r")
    [result] = bench.done.wait(timeout_s=1.0)
    assert result.cancelled
    bench.store.fill(1, "another request")
    after = bench.store.content(1)
    with pytest.raises(TransferError):
        while True:  # until the closed connection shows
            link.send(BlockBytes(1))
    assert bench.store.content(1) == after


@pytest.mark.parametrize("stage", ["queued", "subscribed", "announced"])
def test_a_cancel_is_quiet_within_a_second_at_every_stage(bench: Bench, stage: str) -> None:
    receiver = bench.receiver([TcpTransport()])
    busy: Calls[PullResult] = Calls()
    if stage == "queued":
        for n in range(CONFIG.num_threads):
            receiver.pull(f"busy {n}", bench.played.region, 0, [n], busy)
            link = bench.played.accept()
            link.send(Announcement(f"busy {n}", bench.played.notices(9), 4, True))
            link.wait_for(ReadBlocks)
    receiver.pull("r", bench.played.region, 0, [5, 6], bench.done)
    link = bench.played.accept()
    if stage == "queued":
        link.send(Announcement("r", bench.played.notices(9), 4))
    else:
        link.wait_for(Subscribe)
        if stage == "announced":
            link.send(Announcement("r", bench.played.notices(9), 4))
            link.wait_for(ReadBlocks)
    receiver.cancel("r")
    [result] = bench.done.wait(timeout_s=1.0)
    assert (result.cancelled, result.complete) == (True, False)
    assert not busy.values


def test_the_first_transport_that_connects_is_used_and_the_others_are_explained(bench: Bench) -> None:
    transports = [SharedMemoryTransport(), LoopbackTransport({}), LoopbackTransport({"w": bench.played.store})]
    bench.receiver(transports).pull("r", bench.played.region, 0, [1], bench.done)
    bench.played.accept().send(Announcement("r", bench.played.notices(9), 4, True))
    [result] = bench.done.wait()
    assert result.complete
    assert result.skipped == (
        "shared_memory: worker w keeps its KV pool in private memory",
        "loopback: worker w is not in this process",
    )


def test_without_any_transport_the_reason_names_what_is_missing(bench: Bench) -> None:
    bench.receiver([SharedMemoryTransport()]).pull("r", bench.played.region, 0, [1], bench.done)
    bench.played.accept().send(Announcement("r", bench.played.notices(9), 4, True))
    assert "no transport connects the two workers: shared_memory: worker w keeps" in bench.done.wait()[0].reason


def test_one_pull_per_request_at_a_time(bench: Bench) -> None:
    receiver = bench.receiver()
    receiver.pull("r", bench.played.region, 0, [1], bench.done)
    with pytest.raises(ValueError, match="being pulled already"):
        receiver.pull("r", bench.played.region, 0, [1], bench.done)
    receiver.cancel("r")
    bench.done.wait()
    receiver.pull("r", bench.played.region, 0, [1], bench.done)


def test_a_bug_of_the_caller_ends_its_pull_and_no_other(bench: Bench) -> None:
    receiver = bench.receiver()
    receiver.pull("bad", bench.played.region, 0, [999], bench.done)
    bench.played.accept().send(Announcement("bad", bench.played.notices(9), 4, True))
    assert "unexpected error" in bench.done.wait()[0].reason
    receiver.pull("good", bench.played.region, 0, [1], bench.done)
    bench.played.accept().send(Announcement("good", bench.played.notices(9), 4, True))
    assert bench.done.wait(2)[1].complete


def test_stopping_reports_every_pull_and_leaves_no_thread() -> None:
    bench = Bench()
    before = set(threading.enumerate())
    receiver = bench.receiver()
    for n in range(4):
        receiver.pull(f"r{n}", bench.played.region, 0, [n], bench.done)
    receiver.stop()
    assert sorted(result.request_id for result in bench.done.values) == ["r0", "r1", "r2", "r3"]
    assert set(threading.enumerate()) == before
    with pytest.raises(TransferError, match="stopped"):
        receiver.pull("late", bench.played.region, 0, [1], bench.done)
    bench.close()
