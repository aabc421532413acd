"""What every transport must do, whatever moves the bytes, and whatever the network between the two sides does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import pytest

from eagleray.core.clock import SystemClock
from eagleray.core.config import TransferConfig
from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.core.kv_region import KVRegion
from eagleray.kv_transfer.fake import Calls, MemoryBlockStore
from eagleray.kv_transfer.fake_process import SourceProcess
from eagleray.kv_transfer.fake_proxy import FaultyProxy
from eagleray.kv_transfer.link import Link
from eagleray.kv_transfer.pull import PullResult
from eagleray.kv_transfer.receiver import KVReceiver
from eagleray.kv_transfer.session import SourceProgress
from eagleray.kv_transfer.source import KVSource
from eagleray.kv_transfer.transport import BlockReader, Transport
from eagleray.kv_transfer.transports.select import make_transports

BLOCK_TOKENS = 4
# Two groups of different shape, 2048 + 512 bytes, so that offsets and order matter.
LAYOUT = KVLayout(BLOCK_TOKENS, (LayerGroup("target", 4, 2, 8, "float32"), LayerGroup("draft", 1, 2, 16, "bfloat16")))
CONFIG = TransferConfig(stall_deadline_s=5.0, piece_bytes=3 * LAYOUT.block_bytes)
NUM_BLOCKS = 32


class Watched:
    """A transport that forwards everything, and lets a test act before each read and wait for finished ones."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.reads: Calls[tuple[int, ...]] = Calls()
        self.before_read: Callable[[Sequence[int]], None] = lambda slots: None

    @property
    def name(self) -> str:
        return self._inner.name

    def open(self, source: KVRegion, link: Link) -> WatchedReader:
        return WatchedReader(self._inner.open(source, link), self)

    def close(self) -> None:
        self._inner.close()


class WatchedReader:
    def __init__(self, inner: BlockReader, transport: Watched) -> None:
        self._inner = inner
        self._transport = transport

    def read(
        self, slots: Sequence[int], into: Sequence[Sequence[memoryview]], should_stop: Callable[[], bool]
    ) -> list[bytes]:
        self._transport.before_read(slots)
        fingerprints = self._inner.read(slots, into, should_stop)
        self._transport.reads(tuple(slots))
        return fingerprints

    def close(self) -> None:
        self._inner.close()


@dataclass
class Pair:
    """A source and a receiver in one process, joined by one transport."""

    source_store: MemoryBlockStore
    reader_store: MemoryBlockStore
    source: KVSource
    receiver: KVReceiver
    transport: Watched
    released: Calls[str]
    done: Calls[PullResult]
    address: str = ""  # where the reader finds the source; empty: where it is

    def pull(self, first_block: int, block_ids: Sequence[int]) -> None:
        region = self.source.region
        region = msgspec.structs.replace(region, address=self.address or region.address)
        self.receiver.pull("r", region, first_block, block_ids, self.done)

    def announce(self, block_ids: Sequence[int], num_tokens: int, is_last: bool = False) -> None:
        self.source.announce("r", SourceProgress(tuple(block_ids), num_tokens, is_last, (7,) if is_last else ()))

    def check_copied(self, source_ids: Sequence[int], reader_ids: Sequence[int]) -> None:
        for source_id, reader_id in zip(source_ids, reader_ids, strict=True):
            assert self.reader_store.content(reader_id) == self.source_store.content(source_id)


@pytest.fixture(params=["shared_memory", "tcp", "loopback"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(name: str) -> Iterator[Pair]:
    with joined(name, CONFIG) as pair:
        yield pair


@pytest.fixture
def hasty_pair(name: str) -> Iterator[Pair]:
    with joined(name, CONFIG.model_copy(update={"stall_deadline_s": 0.3})) as pair:
        yield pair


@contextlib.contextmanager
def joined(name: str, config: TransferConfig) -> Iterator[Pair]:
    source_store = MemoryBlockStore(LAYOUT, NUM_BLOCKS, shared=True)
    reader_store = MemoryBlockStore(LAYOUT, NUM_BLOCKS)
    for block_id in range(NUM_BLOCKS):
        source_store.fill(block_id, f"block {block_id}")
    released: Calls[str] = Calls()
    source = KVSource(source_store.region("w"), source_store, SystemClock(), config, released)
    [inner] = make_transports([name], {"w": source_store})
    transport = Watched(inner)
    receiver = KVReceiver(LAYOUT, reader_store, SystemClock(), config, [transport])
    yield Pair(source_store, reader_store, source, receiver, transport, released, Calls())
    receiver.stop()
    source.stop()
    source_store.close()


def test_a_whole_request_arrives_byte_for_byte(pair: Pair) -> None:
    slots, own = [9, 3, 30, 4, 5, 6, 20], [1, 2, 31, 8, 7, 6, 5]
    pair.source.open("r")
    pair.announce(slots, 6 * BLOCK_TOKENS + 1, is_last=True)
    pair.pull(0, own)
    [result] = pair.done.wait()
    pair.check_copied(slots, own)
    assert (result.complete, result.reason, result.transport) == (True, "", pair.transport.name)
    assert (result.num_verified_blocks, result.num_tokens, result.token_ids) == (7, 6 * BLOCK_TOKENS + 1, (7,))
    assert result.num_bytes == 7 * LAYOUT.block_bytes
    assert pair.released.wait() == ["r"]


def test_nothing_but_the_reserved_blocks_is_written(pair: Pair) -> None:
    own = [4, 5, 6]
    before = {block_id: pair.reader_store.content(block_id) for block_id in range(NUM_BLOCKS)}
    pair.source.open("r")
    pair.announce([1, 2, 3], 3 * BLOCK_TOKENS, is_last=True)
    pair.pull(0, own)
    assert pair.done.wait()[0].complete
    assert all(pair.reader_store.content(b) == content for b, content in before.items() if b not in own)


def test_blocks_that_the_reader_holds_are_not_sent(pair: Pair) -> None:
    slots = [9, 3, 30, 4]
    pair.source.open("r")
    pair.announce(slots, 4 * BLOCK_TOKENS, is_last=True)
    pair.pull(2, [1, 2])
    [result] = pair.done.wait()
    pair.check_copied(slots[2:], [1, 2])
    assert (result.complete, result.num_verified_blocks, result.num_tokens) == (True, 2, 4 * BLOCK_TOKENS)
    assert pair.transport.reads.values == [(30, 4)]


def test_a_reader_that_holds_everything_gets_the_sampled_token_alone(pair: Pair) -> None:
    pair.source.open("r")
    pair.announce([9, 3], 2 * BLOCK_TOKENS, is_last=True)
    pair.pull(2, [])
    [result] = pair.done.wait()
    assert (result.complete, result.num_verified_blocks, result.token_ids) == (True, 0, (7,))
    assert pair.released.wait() == ["r"]


def test_blocks_are_read_while_later_ones_are_still_computed(pair: Pair) -> None:
    slots, own = list(range(10, 18)), list(range(8))
    pair.source.open("r")
    pair.pull(0, own)
    for num_full in range(1, 8):
        pair.announce(slots[: num_full + 1], num_full * BLOCK_TOKENS + 1)  # the block after them is not full yet
        assert pair.transport.reads.wait(num_full)[-1] == (slots[num_full - 1],)
    assert not pair.done.values
    pair.announce(slots, 7 * BLOCK_TOKENS + 2, is_last=True)
    [result] = pair.done.wait()
    pair.check_copied(slots, own)
    assert (result.complete, result.num_tokens) == (True, 7 * BLOCK_TOKENS + 2)


def test_a_long_request_is_read_in_pieces(pair: Pair) -> None:
    slots = list(range(20))
    pair.source.open("r")
    pair.announce(slots, 20 * BLOCK_TOKENS, is_last=True)
    pair.pull(0, slots)
    assert pair.done.wait()[0].complete
    assert max(len(read) for read in pair.transport.reads.values) == CONFIG.piece_bytes // LAYOUT.block_bytes
    pair.check_copied(slots, slots)


def test_a_block_that_changes_after_its_announcement_is_refused_and_nothing_after_it_counts(pair: Pair) -> None:
    def reuse_block_4(slots: Sequence[int]) -> None:
        if 4 in slots:
            pair.source_store.fill(4, "another request")

    slots = list(range(6))
    pair.transport.before_read = reuse_block_4
    pair.source.open("r")
    pair.announce(slots, 6 * BLOCK_TOKENS, is_last=True)
    pair.pull(0, slots)
    [result] = pair.done.wait()
    assert (result.complete, result.num_verified_blocks, result.num_tokens) == (False, 4, 4 * BLOCK_TOKENS)
    assert "block 4 arrived with fingerprint" in result.reason
    assert pair.released.wait() == ["r"]


def test_a_cancelled_pull_reports_once_and_the_source_lets_go(pair: Pair) -> None:
    pair.source.open("r")
    pair.announce([1, 2, 3], 2 * BLOCK_TOKENS)
    pair.pull(0, [1, 2, 3])
    pair.transport.reads.wait(1)
    pair.receiver.cancel("r")
    [result] = pair.done.wait(timeout_s=1.0)
    assert (result.complete, result.cancelled) == (False, True)
    assert pair.released.wait(timeout_s=1.0) == ["r"]
    pair.receiver.cancel("r")
    pair.receiver.stop()
    assert len(pair.done.values) == 1


# ---- a bad network


@pytest.fixture
def proxy(pair: Pair) -> Iterator[FaultyProxy]:
    """Between the pair: the reader knows the source by the proxy's address."""
    with FaultyProxy(pair.source.region.address) as proxy:
        pair.address = proxy.address
        yield proxy


def ended_early(pair: Pair, slots: Sequence[int], own: Sequence[int], timeout_s: float = 10.0) -> PullResult:
    """The one report of a pull that broke: what it counts is right and no more than was announced; the source is rid
    of the request."""
    [result] = pair.done.wait(timeout_s=timeout_s)
    assert (result.complete, result.cancelled) == (False, False)
    assert result.reason
    assert result.num_tokens == result.num_verified_blocks * BLOCK_TOKENS
    pair.check_copied(slots[: result.num_verified_blocks], own[: result.num_verified_blocks])
    assert pair.released.wait() == ["r"]
    return result


def test_a_connection_that_is_cut_between_blocks_ends_the_pull_with_what_was_verified(
    pair: Pair, proxy: FaultyProxy
) -> None:
    slots, own = [9, 3, 30, 4, 5], [1, 2, 31, 8, 7]
    pair.source.open("r")
    pair.pull(0, own)
    pair.announce(slots, 2 * BLOCK_TOKENS)
    while sum(len(read) for read in pair.transport.reads.values) < 2:
        pair.transport.reads.wait(len(pair.transport.reads.values) + 1)
    proxy.cut()
    result = ended_early(pair, slots, own)
    assert result.num_verified_blocks == 2
    assert "connection" in result.reason


@pytest.mark.parametrize("num_bytes", [0, 3, 40, 150, 600, 4000, 10_000])
def test_a_connection_that_is_cut_at_any_byte_leaves_nothing_wrong(
    pair: Pair, proxy: FaultyProxy, num_bytes: int
) -> None:
    slots, own = [9, 3, 30, 4, 5], [1, 2, 31, 8, 7]
    proxy.cut_after_bytes = num_bytes
    pair.source.open("r")
    pair.announce(slots, 5 * BLOCK_TOKENS, is_last=True)
    pair.pull(0, own)
    [result] = pair.done.wait()
    said_bytes = 5 * LAYOUT.block_bytes if pair.transport.name == "tcp" else 100  # at least
    assert result.complete == (result.num_verified_blocks == 5)
    assert not result.complete or num_bytes > said_bytes
    assert result.complete or result.num_tokens == result.num_verified_blocks * BLOCK_TOKENS
    pair.check_copied(slots[: result.num_verified_blocks], own[: result.num_verified_blocks])
    assert pair.released.wait() == ["r"]


def test_a_connection_that_is_cut_while_a_piece_is_read_leaves_nothing_wrong(pair: Pair, proxy: FaultyProxy) -> None:
    slots, own = list(range(6)), list(range(6, 12))
    pair.transport.before_read = lambda asked: proxy.cut() if 3 in asked else None
    pair.source.open("r")
    pair.announce(slots, 6 * BLOCK_TOKENS)
    pair.pull(0, own)
    assert ended_early(pair, slots, own).num_verified_blocks >= 3


def test_what_comes_late_and_in_crumbs_arrives_all_the_same(pair: Pair, proxy: FaultyProxy) -> None:
    slots, own = [9, 3, 30, 4], [1, 2, 31, 8]
    proxy.chunk_bytes = 97
    proxy.flowing.clear()
    pair.source.open("r")
    pair.announce(slots, 4 * BLOCK_TOKENS, is_last=True)
    pair.pull(0, own)
    assert proxy.held.wait(10.0)
    assert not pair.done.values
    proxy.flowing.set()
    [result] = pair.done.wait()
    assert (result.complete, result.num_verified_blocks, result.token_ids) == (True, 4, (7,))
    pair.check_copied(slots, own)


def test_what_comes_later_than_the_stall_deadline_is_not_waited_for(hasty_pair: Pair) -> None:
    slots, own = [9, 3, 30, 4], [1, 2, 31, 8]
    with FaultyProxy(hasty_pair.source.region.address) as proxy:
        hasty_pair.address = proxy.address
        proxy.flowing.clear()
        hasty_pair.source.open("r")
        hasty_pair.announce(slots, 4 * BLOCK_TOKENS, is_last=True)
        hasty_pair.pull(0, own)
        assert "stall_deadline_s=0.3" in ended_early(hasty_pair, slots, own, timeout_s=3.0).reason


def test_announcements_that_come_twice_and_again_later_change_nothing(pair: Pair, proxy: FaultyProxy) -> None:
    slots, own = list(range(10, 18)), list(range(8))
    proxy.repeats_announcements = True
    pair.source.open("r")
    pair.pull(0, own)
    for num_full in range(1, 8):
        pair.announce(slots[: num_full + 1], num_full * BLOCK_TOKENS + 1)
        pair.transport.reads.wait(num_full)
    pair.announce(slots, 8 * BLOCK_TOKENS, is_last=True)
    [result] = pair.done.wait()
    assert (result.complete, result.num_verified_blocks, result.token_ids) == (True, 8, (7,))
    pair.check_copied(slots, own)
    assert [slot for read in pair.transport.reads.values for slot in read] == slots, "a block was read twice"
    assert pair.released.wait() == ["r"]


@pytest.mark.parametrize("name", ["tcp"], indirect=True)
def test_a_bit_that_flips_on_the_way_is_noticed(pair: Pair, proxy: FaultyProxy) -> None:
    """The other transports send no byte of a block over a network."""
    slots, own = list(range(6)), list(range(6, 12))

    def flip(raw: bytearray) -> None:
        raw[LAYOUT.block_bytes + 5] ^= 1

    proxy.corrupt = flip
    pair.source.open("r")
    pair.announce(slots, 6 * BLOCK_TOKENS, is_last=True)
    pair.pull(0, own)
    result = ended_early(pair, slots, own)
    assert result.num_verified_blocks == 1
    assert "block 1 arrived with fingerprint" in result.reason


def test_many_requests_share_one_transport(pair: Pair) -> None:
    for n in range(16):
        pair.source.open(f"r{n}")
        pair.source.announce(f"r{n}", SourceProgress((n,), BLOCK_TOKENS, True, (n,)))
        pair.receiver.pull(f"r{n}", pair.source.region, 0, [NUM_BLOCKS - 1 - n], pair.done)
    results = pair.done.wait(16)
    assert all(result.complete and result.token_ids == (int(result.request_id[1:]),) for result in results)
    pair.check_copied(list(range(16)), [NUM_BLOCKS - 1 - n for n in range(16)])


@pytest.mark.parametrize("between_processes", ["shared_memory", "tcp"])
def test_blocks_come_from_another_process(between_processes: str) -> None:
    slots = [5, 4, 9, 8, 1]
    store = MemoryBlockStore(LAYOUT, 16)
    [transport] = make_transports([between_processes], {})
    receiver = KVReceiver(LAYOUT, store, SystemClock(), CONFIG, [transport])
    done: Calls[PullResult] = Calls()
    with SourceProcess(LAYOUT, 16, CONFIG) as source:
        receiver.pull("early", source.region, 1, [0, 1, 2, 3], done)
        source.open("early")
        source.announce("early", slots[:2], BLOCK_TOKENS + 1)
        source.announce("early", slots, 5 * BLOCK_TOKENS, is_last=True)
        [result] = done.wait()
        assert source.wait_released(1) == ["early"]
    receiver.stop()
    assert (result.complete, result.transport, result.num_verified_blocks) == (True, between_processes, 4)
    expected = MemoryBlockStore(LAYOUT, 16)
    for own, slot in enumerate(slots[1:]):
        expected.fill(slot, f"block {slot}")
        assert store.content(own) == expected.content(slot)
