"""Silence, long steps and frames that cannot be sent: what ends a connection, and what must not."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import msgspec
import pytest

from eagleray.core.block_hash import hash_blocks
from eagleray.core.clock import SystemClock
from eagleray.core.config import EngineConfig, RouterConfig, TransferConfig
from eagleray.core.errors import WorkerLost
from eagleray.core.messages import Accepted, Hello, Ping, Submit, ToIngress, TokenOutput
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.decode_workers.worker import build_decode_worker
from eagleray.engine.execution.fake import FakeExecutor, FakeStep
from eagleray.engine.scheduling.plan import StepPlan
from eagleray.router.fake_workers import fake_welcome
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText
from eagleray.workers import channel as channel_module
from eagleray.workers import frames
from eagleray.workers import worker as worker_module
from eagleray.workers.build import WorkerParts
from eagleray.workers.channel import Channel
from eagleray.workers.client import ChannelClient
from eagleray.workers.frames import FrameReader, encode_frame
from eagleray.workers.pool import ConnectedWorkers
from eagleray.workers.worker import Worker

TOKENIZER = byte_tokenizer()
SETTLE_DEADLINE_S = 5.0
SILENCE_DEADLINE_S = 0.2


# ---- a channel without a worker


class Events:
    """A ``ChannelEvents`` that notes what it hears."""

    def __init__(self) -> None:
        self.disconnects: asyncio.Queue[int] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def greeting(self) -> Iterable[ToIngress]:
        return [fake_welcome("w", Role.DECODE)]

    def heartbeat(self) -> ToIngress | None:
        return None

    def submitted(self, connection: int, submit: Submit) -> None:
        raise AssertionError("nothing is submitted")

    def aborted(self, connection: int, request_id: str) -> None:
        raise AssertionError("nothing is aborted")

    def disconnected(self, connection: int) -> None:
        self.loop.call_soon_threadsafe(self.disconnects.put_nowait, connection)


@pytest.fixture
async def events() -> Events:
    return Events()


@pytest.fixture
async def channel(events: Events) -> AsyncIterator[Channel]:
    channel = Channel(events, "127.0.0.1", silence_deadline_s=SILENCE_DEADLINE_S)
    channel.start()
    yield channel
    await asyncio.to_thread(channel.stop)


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(channel: Channel, *words: msgspec.Struct) -> Connection:
    host, _, port = channel.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for message in words:
        writer.write(encode_frame(message))
    return reader, writer


async def to_the_end(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), SETTLE_DEADLINE_S)
    except ConnectionError:
        return b""


async def next_message(frames: FrameReader) -> Any:
    return await asyncio.wait_for(frames.next(), SETTLE_DEADLINE_S)


async def test_whoever_connects_and_says_nothing_is_cut_off(channel: Channel, events: Events) -> None:
    reader, writer = await connect(channel)
    assert await to_the_end(reader) == b""
    writer.close()
    assert events.disconnects.empty(), "it never was an ingress"


async def test_an_ingress_that_has_fallen_silent_is_cut_off_and_its_requests_with_it(
    channel: Channel, events: Events
) -> None:
    reader, writer = await connect(channel, Hello("stopped"))
    assert len(await to_the_end(reader)) > 0
    assert await asyncio.wait_for(events.disconnects.get(), SETTLE_DEADLINE_S) == 1
    writer.close()


async def test_connections_that_come_while_the_channel_stops_leave_no_task_behind(
    channel: Channel, events: Events, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_busy, go_on = threading.Event(), threading.Event()

    def busy() -> ToIngress | None:
        is_busy.set()
        assert go_on.wait(SETTLE_DEADLINE_S)
        return None

    monkeypatch.setattr(events, "heartbeat", busy)
    assert await asyncio.to_thread(is_busy.wait, SETTLE_DEADLINE_S)
    connections = [await connect(channel, Hello("late")) for _ in range(8)]  # the system's, not yet the channel's
    stopping = asyncio.create_task(asyncio.to_thread(channel.stop))
    go_on.set()
    await stopping
    for reader, writer in connections:
        await to_the_end(reader)
        writer.close()
    gc.collect()
    assert "Task was destroyed" not in caplog.text


async def test_an_ingress_that_pings_stays(channel: Channel, events: Events) -> None:
    connection = await connect(channel, Hello("alive"))
    silent = await connect(channel, Hello("stopped"))
    reading = asyncio.create_task(to_the_end(silent[0]))
    while not reading.done():
        connection[1].write(encode_frame(Ping()))
        await asyncio.wait([reading], timeout=SILENCE_DEADLINE_S / 5)
    connection[1].write(encode_frame(Ping()))
    heard = FrameReader(connection[0], ToIngress)
    await next_message(heard)  # its welcome
    channel.send({1: Accepted("still here")})
    assert await next_message(heard) == Accepted("still here")
    for _, writer in (connection, silent):
        writer.close()


async def test_a_message_that_is_too_long_costs_its_own_connection_and_no_other(
    channel: Channel, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlucky, lucky = await connect(channel, Hello("1")), await connect(channel, Hello("2"))
    heard = FrameReader(lucky[0], ToIngress)
    for welcome in (heard, FrameReader(unlucky[0], ToIngress)):
        await next_message(welcome)
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 100)
    channel.send({1: Accepted("x" * 200), 2: Accepted("short")})
    assert await next_message(heard) == Accepted("short")
    await to_the_end(unlucky[0])
    assert await asyncio.wait_for(events.disconnects.get(), SETTLE_DEADLINE_S) == 1
    for _, writer in (unlucky, lucky):
        writer.close()


# ---- a worker whose step is long


class HeldExecutor:
    """The fake, but each step waits until it may go on."""

    def __init__(self) -> None:
        self._executor = FakeExecutor(num_blocks=32, block_size_tokens=4, max_model_tokens=200)
        self.may_step = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def submit(self, plan: StepPlan) -> FakeStep:
        assert self.may_step.wait(SETTLE_DEADLINE_S)
        return self._executor.submit(plan)


SPEC = RequestSpec(
    request_id="a", token_ids=tuple(range(9)), num_prompt_tokens=9, sampling=SamplingParams(max_tokens=3, seed=1)
)
NewWorker = Callable[..., Worker]


@pytest.fixture
async def executor() -> HeldExecutor:
    return HeldExecutor()


@pytest.fixture
async def new_worker(executor: HeldExecutor) -> AsyncIterator[NewWorker]:
    workers: list[Worker] = []

    def new(**engine: object) -> Worker:
        parts = WorkerParts(
            worker_id="w",
            epoch=1,
            executor=executor,
            engine=EngineConfig(**{"block_size_tokens": 4, **engine}),
            transfer=TransferConfig(),
            new_text_stream=lambda spec: OutputText(TOKENIZER, spec.sampling, ()),
            clock=SystemClock(),
        )
        workers.append(build_decode_worker(parts, []))
        workers[-1].start()
        return workers[-1]

    yield new
    executor.may_step.set()
    for worker in workers:
        await asyncio.to_thread(worker.stop)


async def test_a_long_step_is_told_of_while_it_runs_and_costs_nothing(
    new_worker: NewWorker, executor: HeldExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (channel_module, worker_module):
        monkeypatch.setattr(module, "HEARTBEAT_INTERVAL_S", 0.1)
    worker, changed = new_worker(), asyncio.Event()
    heard: asyncio.Queue[TokenOutput | WorkerLost] = asyncio.Queue()
    client = await ChannelClient.connect(
        worker.address, "test", submit_deadline_s=5.0, stall_deadline_s=0.4, on_change=changed.set
    )
    await client.submit(Submit(SPEC), heard.put_nowait)
    told: list[WorkerSnapshot] = []
    async with asyncio.timeout(SETTLE_DEADLINE_S):
        while not told or told[-1].step_running_s < 0.6:  # longer than the connection may be silent
            changed.clear()
            await changed.wait()
            told.append(client.snapshot)
    long = [snapshot for snapshot in told if snapshot.step_running_s > 0.2]
    assert len({snapshot.number for snapshot in long}) == 1, "the last snapshot again"
    assert len(long) > 2 and worker.is_healthy and not client.is_lost
    executor.may_step.set()
    item = await asyncio.wait_for(heard.get(), SETTLE_DEADLINE_S)
    assert isinstance(item, TokenOutput)
    await client.aclose()


async def test_an_idle_worker_is_heard_while_its_thread_sleeps(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (channel_module, worker_module):
        monkeypatch.setattr(module, "HEARTBEAT_INTERVAL_S", 0.1)
    worker, heard = new_worker(), asyncio.Semaphore(0)
    client = await ChannelClient.connect(
        worker.address, "test", submit_deadline_s=5.0, stall_deadline_s=0.4, on_change=heard.release
    )
    number = client.snapshot.number
    async with asyncio.timeout(SETTLE_DEADLINE_S):
        for _ in range(8):  # in more time than the connection may be silent
            await heard.acquire()
    assert client.snapshot.number == number and client.snapshot.step_running_s == 0 and not client.is_lost
    await client.aclose()


async def test_a_step_that_does_not_end_makes_the_worker_unhealthy_and_sends_its_requests_elsewhere(
    new_worker: NewWorker,
) -> None:
    worker = new_worker(step_deadline_s=0.3)
    heard: asyncio.Queue[TokenOutput | WorkerLost] = asyncio.Queue()
    client = await ChannelClient.connect(
        worker.address, "test", submit_deadline_s=5.0, stall_deadline_s=5.0, on_change=lambda: None
    )
    await client.submit(Submit(SPEC), heard.put_nowait)
    lost = await asyncio.wait_for(heard.get(), SETTLE_DEADLINE_S)
    assert isinstance(lost, WorkerLost) and lost.engine_failed and "engine.step_deadline_s=0.3" in lost.reason
    assert not worker.is_healthy


async def test_what_a_worker_holds_is_known_to_an_ingress_that_comes_later_and_forgotten_when_it_goes(
    new_worker: NewWorker, executor: HeldExecutor
) -> None:
    executor.may_step.set()
    worker = new_worker()
    heard: asyncio.Queue[TokenOutput | WorkerLost] = asyncio.Queue()
    hashes: list[Any] = []

    async def until_cached(pool: ConnectedWorkers, expected: dict[str, int]) -> None:
        async with asyncio.timeout(SETTLE_DEADLINE_S):
            while not hashes or await pool.caches.index.lookup(hashes) != expected:
                await pool.wait_for_change(0.1)
                if not hashes and pool.workers():
                    root = worker._engine.namespace.root()
                    hashes.extend(hash_blocks(root, SPEC.token_ids, 4))

    first, second = (ConnectedWorkers(name, RouterConfig(), SystemClock()) for name in ("1", "2"))
    first.set_addresses({worker.address})
    await until_cached(first, {})
    await first.workers()["w"].submit(Submit(SPEC), heard.put_nowait)
    await until_cached(first, {"w": 2})
    second.set_addresses({worker.address})
    await until_cached(second, {"w": 2})
    await asyncio.to_thread(worker.stop)
    await until_cached(second, {})
    for pool in (first, second):
        await pool.aclose()
