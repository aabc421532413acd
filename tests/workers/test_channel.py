"""A worker and its clients over real sockets: what is answered, what is aborted, and what counts as lost."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from eagleray.core.clock import SystemClock
from eagleray.core.config import EngineConfig, TransferConfig
from eagleray.core.errors import WorkerLost
from eagleray.core.messages import (
    PROTOCOL_VERSION,
    Abort,
    Accepted,
    Hello,
    RefusalKind,
    StepOutputs,
    Submit,
    ToIngress,
    TokenOutput,
)
from eagleray.core.request import FinishReason, RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import WorkerSnapshot
from eagleray.decode_workers.worker import build_decode_worker
from eagleray.engine.execution.fake import FakeExecutor, FakeStep
from eagleray.engine.scheduling.plan import StepPlan
from eagleray.router.worker_client import SubmitRefused
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText
from eagleray.workers.build import WorkerParts
from eagleray.workers.client import ChannelClient
from eagleray.workers.frames import FrameReader, encode_frame
from eagleray.workers.worker import Worker

TOKENIZER = byte_tokenizer()
SETTLE_DEADLINE_S = 5.0
SLOW_STEP_S = 0.02


class PacedExecutor:
    """Computes as the fake does, but takes its time for a step until it is hurried, and fails when told to."""

    def __init__(self, num_blocks: int = 32) -> None:
        self._executor = FakeExecutor(num_blocks=num_blocks, block_size_tokens=4, max_model_tokens=1000)
        self.hurry = threading.Event()
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def submit(self, plan: StepPlan) -> FakeStep:
        self.hurry.wait(SLOW_STEP_S)
        if self.error is not None:
            raise self.error
        return self._executor.submit(plan)


class Inbox:
    """What one request hears."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[TokenOutput | WorkerLost] = asyncio.Queue()
        self.tokens: list[int] = []

    def __call__(self, item: TokenOutput | WorkerLost) -> None:
        self._items.put_nowait(item)

    async def next(self) -> TokenOutput | WorkerLost:
        item = await asyncio.wait_for(self._items.get(), SETTLE_DEADLINE_S)
        if isinstance(item, TokenOutput):
            self.tokens.extend(item.token_ids)
        return item

    async def finish(self) -> FinishReason:
        while True:
            item = await self.next()
            assert isinstance(item, TokenOutput), item
            if item.finish_reason is not None:
                return item.finish_reason


class Ingress:
    """A client that lets a test wait for what the worker says of itself."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.client: ChannelClient

    async def connect(self, address: str, *, submit_deadline_s: float = 5.0, stall_deadline_s: float = 5.0) -> Ingress:
        self.client = await ChannelClient.connect(
            address,
            "test",
            submit_deadline_s=submit_deadline_s,
            stall_deadline_s=stall_deadline_s,
            on_change=self.changed.set,
        )
        return self

    async def until(self, holds: Callable[[WorkerSnapshot], bool]) -> None:
        async with asyncio.timeout(SETTLE_DEADLINE_S):
            while not holds(self.client.snapshot):
                self.changed.clear()
                await self.changed.wait()


def is_idle(snapshot: WorkerSnapshot) -> bool:
    return snapshot.num_running == snapshot.num_waiting == 0 and snapshot.blocks_free == snapshot.blocks_total


def new_spec(name: str, num_prompt_tokens: int = 10, **sampling: object) -> RequestSpec:
    prompt = tuple(random.Random(name).choices(range(250), k=num_prompt_tokens))
    params = SamplingParams(**{"max_tokens": 8, "seed": 1, "ignore_eos": True, **sampling})
    return RequestSpec(request_id=name, token_ids=prompt, num_prompt_tokens=num_prompt_tokens, sampling=params)


def endless(name: str) -> RequestSpec:
    return new_spec(name, max_tokens=100)


@pytest.fixture
def executor() -> PacedExecutor:
    return PacedExecutor()


@asynccontextmanager
async def decode_worker(executor: PacedExecutor, num_seats: int, num_places: int) -> AsyncIterator[Worker]:
    """So many requests run at a time, and so many wait."""
    parts = WorkerParts(
        worker_id="w",
        epoch=1,
        executor=executor,
        engine=EngineConfig(block_size_tokens=4, max_num_seqs=num_seats, max_num_waiting=num_places),
        transfer=TransferConfig(),
        new_text_stream=lambda spec: OutputText(TOKENIZER, spec.sampling, ()),
        clock=SystemClock(),
    )
    worker = build_decode_worker(parts, [])
    worker.start()
    yield worker
    await asyncio.to_thread(worker.stop)


@pytest.fixture
async def worker(executor: PacedExecutor) -> AsyncIterator[Worker]:
    """A decode worker with one seat and one place in its queue."""
    async with decode_worker(executor, num_seats=1, num_places=1) as worker:
        yield worker


@pytest.fixture
async def ingress(worker: Worker) -> AsyncIterator[Ingress]:
    ingress = await Ingress().connect(worker.address)
    yield ingress
    await ingress.client.aclose()


# ---- submits


async def test_an_accepted_request_gets_its_tokens_and_leaves_nothing(
    worker: Worker, ingress: Ingress, executor: PacedExecutor
) -> None:
    executor.hurry.set()
    spec, inbox = new_spec("a"), Inbox()
    assert await ingress.client.submit(Submit(spec), inbox) == Accepted("a")
    assert await inbox.finish() is FinishReason.LENGTH
    assert inbox.tokens == FakeExecutor(max_model_tokens=1000).continuation(spec, 8)
    await ingress.until(lambda snapshot: is_idle(snapshot) and snapshot.output_tokens_total == 8)
    assert not worker.serves("a")
    worker.check_integrity()


@pytest.mark.parametrize("num_prompt_tokens", [0, 4 * 32])
async def test_a_request_that_can_never_be_computed_is_refused_as_invalid(
    ingress: Ingress, num_prompt_tokens: int
) -> None:
    with pytest.raises(SubmitRefused) as refusal:
        await ingress.client.submit(Submit(new_spec("a", num_prompt_tokens)), Inbox())
    assert refusal.value.kind is RefusalKind.INVALID


async def test_a_request_id_that_is_being_served_is_refused_and_the_first_goes_on(
    ingress: Ingress, executor: PacedExecutor, worker: Worker
) -> None:
    spec, inbox = new_spec("a"), Inbox()
    await ingress.client.submit(Submit(spec), inbox)
    other = await Ingress().connect(worker.address)
    with pytest.raises(SubmitRefused, match="already") as refusal:
        await other.client.submit(Submit(spec), Inbox())
    assert refusal.value.kind is RefusalKind.INCOMPATIBLE
    executor.hurry.set()
    await inbox.finish()
    assert inbox.tokens == FakeExecutor(max_model_tokens=1000).continuation(spec, 8)
    await other.client.aclose()


async def test_a_request_beyond_the_queue_is_refused_for_lack_of_room(ingress: Ingress) -> None:
    await ingress.client.submit(Submit(endless("running")), Inbox())
    await ingress.until(lambda snapshot: snapshot.num_running == 1)
    await ingress.client.submit(Submit(endless("waiting")), Inbox())
    with pytest.raises(SubmitRefused, match="1 requests are waiting") as refusal:
        await ingress.client.submit(Submit(endless("too many")), Inbox())
    assert refusal.value.kind is RefusalKind.NO_ROOM


async def test_an_aborted_request_frees_its_blocks_and_is_heard_of_no_more(ingress: Ingress) -> None:
    inbox, waiting = Inbox(), Inbox()
    await ingress.client.submit(Submit(endless("a")), inbox)
    await inbox.next()
    await ingress.client.submit(Submit(endless("b")), waiting)
    ingress.client.abort("b")
    ingress.client.abort("a")
    ingress.client.abort("a")
    ingress.client.abort("never heard of")
    await ingress.until(is_idle)
    assert waiting.tokens == []


async def test_a_client_aborts_only_its_own_requests(worker: Worker, ingress: Ingress) -> None:
    inbox = Inbox()
    await ingress.client.submit(Submit(endless("a")), inbox)
    async with raw_connection(worker.address) as (_, writer):
        writer.write(encode_frame(Hello("other")) + encode_frame(Abort("a")))
        await inbox.next()
        await inbox.next()
    assert isinstance(await inbox.next(), TokenOutput)


# ---- steps


class NotingExecutor(PacedExecutor):
    """Notes which requests each step samples for, and takes its time until there is a step for ``num_together``."""

    def __init__(self, num_together: int) -> None:
        super().__init__(num_blocks=128)
        self.sampled: list[set[str]] = []
        self._num_together = num_together

    def submit(self, plan: StepPlan) -> FakeStep:
        step = super().submit(plan)
        self.sampled.append({run.spec.request_id for run in plan.runs if run.samples})
        if len(self.sampled[-1]) == self._num_together:
            self.hurry.set()
        return step


async def heard_by_an_ingress(address: str, request_ids: set[str]) -> list[list[str]]:
    """Of each message with tokens, whose they are, until all requests have ended."""
    heard: list[list[str]] = []
    unfinished = set(request_ids)
    async with raw_connection(address) as (reader, writer):
        submits = [Submit(new_spec(name, max_tokens=50)) for name in sorted(request_ids)]
        writer.write(b"".join(map(encode_frame, [Hello(min(request_ids)), *submits])))
        frames = FrameReader(reader, ToIngress)
        while unfinished:
            message = await asyncio.wait_for(frames.next(), SETTLE_DEADLINE_S)
            assert message is not None, "the worker has closed the connection"
            if isinstance(message, StepOutputs) and message.outputs:
                heard.append([output.request_id for output in message.outputs])
                unfinished -= {output.request_id for output in message.outputs if output.finish_reason is not None}
    return heard


async def test_a_step_is_one_message_to_each_ingress_with_the_tokens_of_all_its_requests() -> None:
    ours, theirs = {"a", "b", "c"}, {"d", "e"}
    executor = NotingExecutor(num_together=5)
    async with decode_worker(executor, num_seats=5, num_places=5) as worker:
        heard = await asyncio.gather(*(heard_by_an_ingress(worker.address, names) for names in (ours, theirs)))
    assert ours | theirs in executor.sampled
    for names, messages in zip((ours, theirs), heard, strict=True):
        assert [set(message) for message in messages] == [step & names for step in executor.sampled if step & names]
        assert all(len(message) == len(set(message)) for message in messages)


# ---- clients that go


async def test_a_client_that_disconnects_takes_its_requests_along(worker: Worker, ingress: Ingress) -> None:
    leaver, inbox = await Ingress().connect(worker.address), Inbox()
    await leaver.client.submit(Submit(endless("running")), inbox)
    await inbox.next()
    await leaver.client.submit(Submit(endless("waiting")), Inbox())
    await ingress.until(lambda snapshot: snapshot.num_running == snapshot.num_waiting == 1)
    await leaver.client.aclose()
    await ingress.until(is_idle)
    await asyncio.to_thread(worker.check_integrity)


@asynccontextmanager
async def raw_connection(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    yield reader, writer
    writer.close()


GARBAGE = {
    "an HTTP request": b"GET / HTTP/1.1\r\n\r\n",
    "no hello": encode_frame(Abort("a")),
    "garbage after the hello": encode_frame(Hello("x")) + b"\x00\x00\x00\x01\xc1",
    "a hello of another version": encode_frame(Hello("x", protocol=PROTOCOL_VERSION + 1)),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_whoever_does_not_speak_the_protocol_is_cut_off_and_disturbs_nobody(
    garbage: bytes, worker: Worker, ingress: Ingress, executor: PacedExecutor
) -> None:
    async with raw_connection(worker.address) as (reader, writer):
        writer.write(garbage)
        await asyncio.wait_for(reader.read(), SETTLE_DEADLINE_S)  # to the end of the connection
    executor.hurry.set()
    inbox = Inbox()
    await ingress.client.submit(Submit(new_spec("a")), inbox)
    assert await inbox.finish() is FinishReason.LENGTH
    assert worker.is_healthy


# ---- workers that go


async def test_a_worker_that_stops_is_lost_to_every_request_at_once(worker: Worker, ingress: Ingress) -> None:
    inbox = Inbox()
    await ingress.client.submit(Submit(endless("a")), inbox)
    await asyncio.to_thread(worker.stop)
    while not isinstance(item := await inbox.next(), WorkerLost):
        pass
    assert item.worker_id == "w" and ingress.client.is_lost
    await asyncio.wait_for(ingress.client.wait_lost(), SETTLE_DEADLINE_S)
    with pytest.raises(WorkerLost):
        await ingress.client.submit(Submit(endless("b")), Inbox())
    ingress.client.abort("a")
    assert worker.failure is None


async def test_an_engine_that_fails_closes_the_channel_and_makes_the_worker_unhealthy(
    worker: Worker, ingress: Ingress, executor: PacedExecutor
) -> None:
    inbox = Inbox()
    await ingress.client.submit(Submit(endless("a")), inbox)
    executor.error = RuntimeError("the device is gone")
    while not isinstance(await inbox.next(), WorkerLost):
        pass
    assert not worker.is_healthy and worker.failure is executor.error
    async with asyncio.timeout(SETTLE_DEADLINE_S):
        with pytest.raises(WorkerLost):
            while True:  # the channel closes in a thread of its own, a moment after the ingress has heard
                await Ingress().connect(worker.address, submit_deadline_s=SETTLE_DEADLINE_S)
    assert await asyncio.to_thread(worker.drain, SETTLE_DEADLINE_S), "nothing is left to wait for"


async def test_a_draining_worker_refuses_new_requests_and_finishes_old_ones(
    worker: Worker, ingress: Ingress, executor: PacedExecutor
) -> None:
    inbox = Inbox()
    await ingress.client.submit(Submit(new_spec("old")), inbox)
    assert not worker.drain(0.0)
    with pytest.raises(SubmitRefused) as refusal:
        await ingress.client.submit(Submit(new_spec("new")), Inbox())
    assert refusal.value.kind is RefusalKind.DRAINING
    executor.hurry.set()
    assert await inbox.finish() is FinishReason.LENGTH
    assert await asyncio.to_thread(worker.drain, SETTLE_DEADLINE_S)
