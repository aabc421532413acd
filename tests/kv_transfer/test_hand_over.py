"""Both ends together: dying processes, many requests at once, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from eagleray.core.clock import SystemClock
from eagleray.core.config import TransferConfig
from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.kv_transfer.fake import Calls, MemoryBlockStore
from eagleray.kv_transfer.fake_process import SourceProcess
from eagleray.kv_transfer.pull import PullResult
from eagleray.kv_transfer.receiver import KVReceiver
from eagleray.kv_transfer.session import SourceProgress
from eagleray.kv_transfer.source import KVSource
from eagleray.kv_transfer.transports.select import make_transports

LAYOUT = KVLayout(4, (LayerGroup("target", 2, 2, 16, "float32"),))  # blocks of 2048 bytes
CONFIG = TransferConfig(stall_deadline_s=0.6, piece_bytes=4096)


class GatedStore(MemoryBlockStore):
    """A reader's pool that tells of each block about to be written, and may act then."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(LAYOUT, num_blocks)
        self.written: Calls[int] = Calls()
        self.before_write: Callable[[int], None] = lambda block_id: None

    def block_views(self, block_id: int) -> list[memoryview]:
        self.before_write(block_id)
        self.written(block_id)
        return super().block_views(block_id)


@pytest.fixture(params=["shared_memory", "tcp"])
def transport_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def reader(transport_name: str) -> Iterator[tuple[KVReceiver, GatedStore, Calls[PullResult]]]:
    store = GatedStore(16)
    receiver = KVReceiver(LAYOUT, store, SystemClock(), CONFIG, make_transports([transport_name], {}))
    yield receiver, store, Calls()
    receiver.stop()


Reader = tuple[KVReceiver, GatedStore, Calls[PullResult]]
STAGES = ["before the request is known", "between blocks"]


def bring_to(stage: str, source: SourceProcess, reader: Reader) -> None:
    receiver, store, done = reader
    if stage != "before the request is known":
        source.open("r")
    receiver.pull("r", source.region, 0, [0, 1, 2, 3], done)
    if stage == "between blocks":
        source.announce("r", [5, 6, 7], 9)
        store.written.wait(2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_source_that_is_killed_ends_the_pull(stage: str, reader: Reader) -> None:
    _, _, done = reader
    with SourceProcess(LAYOUT, 16, CONFIG) as source:
        bring_to(stage, source, reader)
        source.kill()
        [result] = done.wait(timeout_s=2.0)
    assert (result.complete, result.cancelled) == (False, False)
    assert result.reason
    assert result.num_tokens == result.num_verified_blocks * 4 <= 8


@pytest.mark.parametrize("stage", STAGES)
def test_a_source_that_is_frozen_ends_the_pull_at_the_stall_deadline(stage: str, reader: Reader) -> None:
    _, _, done = reader
    with SourceProcess(LAYOUT, 16, CONFIG) as source:
        bring_to(stage, source, reader)
        source.freeze()
        [result] = done.wait(timeout_s=3.0)
    assert (result.complete, result.cancelled) == (False, False)
    assert "stall_deadline_s=0.6" in result.reason


def test_a_source_killed_while_a_piece_is_copied_leaves_only_verified_blocks(
    transport_name: str, reader: Reader
) -> None:
    receiver, store, done = reader
    with SourceProcess(LAYOUT, 16, CONFIG) as source:
        store.before_write = lambda block_id: source.kill() if block_id == 2 else None
        source.open("r")
        source.announce("r", [5, 6, 7, 8], 16, is_last=True)
        receiver.pull("r", source.region, 0, [0, 1, 2, 3], done)
        [result] = done.wait()
    # Memory outlives its process while it is mapped, so that a finished prefill is not lost with its worker.
    assert result.num_verified_blocks == (4 if transport_name == "shared_memory" else 2)
    assert result.complete == (transport_name == "shared_memory")


def test_a_source_that_is_busy_for_longer_than_the_stall_deadline_is_waited_for(reader: Reader) -> None:
    receiver, _, done = reader
    with SourceProcess(LAYOUT, 16, CONFIG) as source:
        source.open("r")
        receiver.pull("r", source.region, 0, [0], done)
        with pytest.raises(TimeoutError):
            done.wait(timeout_s=2 * CONFIG.stall_deadline_s)
        source.announce("r", [5], 4, is_last=True)
        assert done.wait()[0].complete


# ---- many at once


def engine_thread(source: KVSource, request_ids: Sequence[str], seed: int) -> threading.Thread:
    """Computes requests of 8 blocks in chunks, interleaved at random, as an engine would."""

    def run() -> None:
        chance = random.Random(seed)
        computed = dict.fromkeys(request_ids, 0)
        while computed:
            request_id = chance.choice(sorted(computed))
            if not computed[request_id]:
                source.open(request_id)
            computed[request_id] += chance.randint(1, 20)
            is_last = computed[request_id] >= 30
            progress = SourceProgress(tuple(range(8)), min(30, computed[request_id]), is_last, (7,) if is_last else ())
            source.announce(request_id, progress)
            if is_last or chance.random() < 0.02:
                if not is_last:
                    source.close(request_id, "aborted at the source")
                del computed[request_id]

    return threading.Thread(target=run)


@pytest.mark.parametrize("name", ["shared_memory", "tcp", "loopback"])
def test_fifty_pulls_with_random_cancels_release_every_request_exactly_once(name: str) -> None:
    chance = random.Random(1)
    config = TransferConfig(piece_bytes=4096)
    source_store, reader_store = MemoryBlockStore(LAYOUT, 8, shared=True), MemoryBlockStore(LAYOUT, 50 * 8)
    for block_id in range(8):
        source_store.fill(block_id, f"block {block_id}")
    released, done = Calls[str](), Calls[PullResult]()
    source = KVSource(source_store.region("w"), source_store, SystemClock(), config, released)
    transports = make_transports([name], {"w": source_store})
    receiver = KVReceiver(LAYOUT, reader_store, SystemClock(), config, transports)
    request_ids = [f"r{n}" for n in range(50)]
    engine = engine_thread(source, request_ids, seed=2)
    engine.start()
    cancelled = set()
    for n, request_id in enumerate(request_ids):
        receiver.pull(request_id, source.region, 0, range(8 * n, 8 * n + 8), done)
        if chance.random() < 0.4:
            victim = request_ids[chance.randint(0, n)]
            receiver.cancel(victim)
            cancelled.add(victim)
    results = done.wait(50, timeout_s=30.0)
    engine.join(30.0)
    source.stop()
    receiver.stop()
    assert sorted(released.values) == sorted(request_ids)
    assert sorted(result.request_id for result in results) == sorted(request_ids)
    for result in results:
        assert result.complete or result.cancelled or result.reason == "aborted at the source", result
        assert not result.cancelled or result.request_id in cancelled
        first = 8 * int(result.request_id[1:])
        for index in range(result.num_verified_blocks):
            assert reader_store.content(first + index) == source_store.content(index)
    assert any(result.complete for result in results)
    assert any(result.cancelled for result in results)


@pytest.mark.parametrize("name", ["shared_memory", "tcp", "loopback"])
def test_no_descriptor_thread_or_mapping_is_left(name: str) -> None:
    def used() -> tuple[int, int, int]:
        gc.collect()  # a source and its reactor know each other
        with open("/proc/self/maps") as maps:
            mapped = sum("eagleray-fake-kv" in line for line in maps)
        return len(os.listdir("/proc/self/fd")), threading.active_count(), mapped

    def round_trip() -> None:
        store = MemoryBlockStore(LAYOUT, 8, shared=True)
        released, done = Calls[str](), Calls[PullResult]()
        source = KVSource(store.region("w"), store, SystemClock(), CONFIG, released)
        receiver = KVReceiver(
            LAYOUT, MemoryBlockStore(LAYOUT, 8), SystemClock(), CONFIG, make_transports([name], {"w": store})
        )
        for n in range(5):
            source.open(f"r{n}")
            source.announce(f"r{n}", SourceProgress((1, 2), 8, is_last=n != 4))
            receiver.pull(f"r{n}", source.region, 0, [1, 2], done)
        done.wait(4)
        receiver.cancel("r4")
        done.wait(5)
        released.wait(5)
        receiver.stop()
        source.stop()
        store.close()

    round_trip()  # whatever is made once, such as the epoll of the first import
    before = used()
    for _ in range(3):
        round_trip()
    assert used() == before
