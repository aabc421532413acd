"""The ingress's end of a channel against a worker that says what a script says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from eagleray.core.errors import WorkerLost
from eagleray.core.messages import (
    PROTOCOL_VERSION,
    Abort,
    Accepted,
    Failed,
    Hello,
    Ping,
    StepOutputs,
    Submit,
    ToIngress,
    TokenOutput,
    ToWorker,
)
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import Role
from eagleray.router.fake_workers import fake_welcome
from eagleray.workers.client import ChannelClient
from eagleray.workers.frames import FrameReader, encode_frame

SETTLE_DEADLINE_S = 5.0
SPEC = RequestSpec(request_id="a", token_ids=(1, 2), num_prompt_tokens=2, sampling=SamplingParams())


class ScriptedWorker:
    """The other end of one connection: answers what the test says, and keeps silent otherwise."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[Any] = asyncio.Queue()
        self.pings: asyncio.Queue[Ping] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.address = ""
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> ScriptedWorker:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        if self._writer is not None:
            self._writer.close()

    async def next_heard(self) -> Any:
        return await asyncio.wait_for(self.heard.get(), SETTLE_DEADLINE_S)

    def say(self, data: msgspec.Struct | bytes) -> None:
        assert self._writer is not None
        self._writer.write(data if isinstance(data, bytes) else encode_frame(data))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        frames = FrameReader(reader, ToWorker)
        while (message := await frames.next()) is not None:
            (self.pings if isinstance(message, Ping) else self.heard).put_nowait(message)
        self.closed.set()


@pytest.fixture
async def script() -> AsyncIterator[ScriptedWorker]:
    async with ScriptedWorker() as script:
        yield script


async def connect(address: str, *, submit_deadline_s: float = 5.0, stall_deadline_s: float = 5.0) -> ChannelClient:
    return await ChannelClient.connect(
        address,
        "test",
        submit_deadline_s=submit_deadline_s,
        stall_deadline_s=stall_deadline_s,
        on_change=lambda: None,
    )


async def connected(script: ScriptedWorker, **deadlines: float) -> ChannelClient:
    connecting = asyncio.create_task(connect(script.address, **deadlines))
    assert isinstance(await script.next_heard(), Hello)
    script.say(fake_welcome("w", Role.DECODE))
    return await connecting


def ignore(item: TokenOutput | WorkerLost) -> None:
    """A sink for a request that will hear nothing."""


async def test_a_worker_that_stays_silent_is_lost_after_the_stall_deadline(script: ScriptedWorker) -> None:
    client, heard = await connected(script, stall_deadline_s=0.2), asyncio.Queue[TokenOutput | WorkerLost]()
    submitting = asyncio.create_task(client.submit(Submit(SPEC), heard.put_nowait))
    await script.next_heard()
    script.say(Accepted("a"))
    await submitting
    item = await asyncio.wait_for(heard.get(), SETTLE_DEADLINE_S)
    assert isinstance(item, WorkerLost) and "silent for 0.2 s" in item.reason
    assert client.is_lost


async def test_a_submit_without_an_answer_is_given_up_and_aborted(script: ScriptedWorker) -> None:
    client = await connected(script, submit_deadline_s=0.1)
    with pytest.raises(WorkerLost, match="no answer to a submit"):
        await client.submit(Submit(SPEC), ignore)
    assert isinstance(await script.next_heard(), Submit)
    assert await script.next_heard() == Abort("a")
    script.say(Accepted("a"))  # too late, and harmless
    assert not client.is_lost
    await client.aclose()


async def test_a_submit_that_is_cancelled_is_aborted(script: ScriptedWorker) -> None:
    client = await connected(script)
    submitting = asyncio.create_task(client.submit(Submit(SPEC), ignore))
    await script.next_heard()
    submitting.cancel()
    assert await script.next_heard() == Abort("a")
    await client.aclose()


async def test_a_snapshot_that_was_overtaken_by_a_newer_one_does_not_count(script: ScriptedWorker) -> None:
    client = await connected(script)
    newer, older = (msgspec.structs.replace(client.snapshot, number=number, num_running=number) for number in (8, 7))
    submitting = asyncio.create_task(client.submit(Submit(SPEC), ignore))
    await script.next_heard()
    for told in (StepOutputs(snapshot=newer), StepOutputs(snapshot=older), Accepted("a")):
        script.say(told)
    await asyncio.wait_for(submitting, SETTLE_DEADLINE_S)
    assert client.snapshot == newer
    await client.aclose()


async def test_a_worker_that_sends_garbage_is_lost(script: ScriptedWorker) -> None:
    client = await connected(script)
    script.say(b"\x00\x00\x00\x01\xc1")
    await asyncio.wait_for(client.wait_lost(), SETTLE_DEADLINE_S)
    assert client.is_lost and not client.has_requests


FIRST_WORDS = {
    "not a worker": (Accepted("a"), "not a worker"),
    "garbage": (b"\x00\x00\x00\x01\xc1", "no connection"),
    "another version": (
        msgspec.structs.replace(fake_welcome("w", Role.DECODE), protocol=PROTOCOL_VERSION + 1),
        f"speaks protocol {PROTOCOL_VERSION + 1}",
    ),
    "nothing in time": (b"", "no answer in time"),
}


@pytest.mark.parametrize(("words", "reason"), FIRST_WORDS.values(), ids=FIRST_WORDS)
async def test_a_connection_without_a_proper_welcome_fails_saying_why(
    script: ScriptedWorker, words: msgspec.Struct | bytes, reason: str
) -> None:
    connecting = asyncio.create_task(connect(script.address, submit_deadline_s=0.3))
    await script.next_heard()
    script.say(words)
    with pytest.raises(WorkerLost, match=reason):
        await connecting


def test_the_fakes_welcome_is_a_message() -> None:
    welcome = fake_welcome("w", Role.DECODE)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(welcome), type=ToIngress) == welcome


async def test_an_ingress_pings_so_that_the_worker_knows_that_it_lives(script: ScriptedWorker) -> None:
    client = await connected(script)
    await asyncio.wait_for(script.pings.get(), SETTLE_DEADLINE_S)
    await client.aclose()


async def test_a_connection_that_is_given_up_while_it_is_made_is_closed(script: ScriptedWorker) -> None:
    connecting = asyncio.create_task(connect(script.address))
    await script.next_heard()
    connecting.cancel()
    await asyncio.wait([connecting])
    await asyncio.wait_for(script.closed.wait(), SETTLE_DEADLINE_S)


async def test_a_worker_that_says_that_its_engine_failed_is_lost_for_that_reason(script: ScriptedWorker) -> None:
    client, heard = await connected(script), asyncio.Queue[TokenOutput | WorkerLost]()
    submitting = asyncio.create_task(client.submit(Submit(SPEC), heard.put_nowait))
    await script.next_heard()
    script.say(Accepted("a"))
    await submitting
    script.say(Failed("the device is gone"))
    item = await asyncio.wait_for(heard.get(), SETTLE_DEADLINE_S)
    assert isinstance(item, WorkerLost) and (item.reason, item.engine_failed) == ("the device is gone", True)


async def test_a_connection_that_is_closed_before_it_was_read_is_closed(script: ScriptedWorker) -> None:
    connecting = asyncio.create_task(connect(script.address))
    await script.next_heard()
    script.say(fake_welcome("w", Role.DECODE))
    await (await connecting).aclose()
    await asyncio.wait_for(script.closed.wait(), SETTLE_DEADLINE_S)
