"""Whatever comes over a connection is a message, the end, or a ``ChannelError``: nothing else, and no endless wait."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.core.messages import Abort, Hello, ToWorker
from eagleray.workers import frames
from eagleray.workers.frames import MAX_FRAME_BYTES, ChannelError, FrameReader, encode_frame


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


async def read_all(received: bytes) -> list[Any]:
    """Messages of a connection that brings ``received`` and then closes."""
    reader = asyncio.StreamReader()
    reader.feed_data(received)
    reader.feed_eof()
    frame_reader, messages = FrameReader(reader, ToWorker), []
    async with asyncio.timeout(5):
        while (message := await frame_reader.next()) is not None:
            messages.append(message)
    return messages


async def test_messages_come_out_as_they_went_in_and_a_close_between_them_is_the_end() -> None:
    sent = [Hello("ingress"), Abort("a"), Abort("b" * 70_000)]
    assert await read_all(b"".join(map(encode_frame, sent))) == sent


@pytest.mark.parametrize("kept_bytes", [1, 3, 4, 5, -1])
async def test_a_connection_that_closes_inside_a_frame_is_an_error(kept_bytes: int) -> None:
    with pytest.raises(ChannelError, match="inside a frame"):
        await read_all(encode_frame(Abort("a"))[:kept_bytes])


async def test_a_frame_that_announces_too_much_is_refused_before_it_is_waited_for() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ChannelError, match=str(MAX_FRAME_BYTES)):
        await asyncio.wait_for(FrameReader(reader, ToWorker).next(), 5)


def test_a_message_over_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 10)
    with pytest.raises(ChannelError, match=r"Abort of .* bytes is over the limit of 10"):
        encode_frame(Abort("a long request id"))


async def test_frames_that_have_come_together_are_read_together_however_they_were_cut() -> None:
    sent = [Abort(f"request {number}") for number in range(5)]
    received = b"".join(map(encode_frame, sent))
    for cut in range(len(received)):
        reader = asyncio.StreamReader()
        frame_reader = FrameReader(reader, ToWorker)
        reader.feed_data(received[:cut])
        heard = [await frame_reader.next()] if cut >= len(encode_frame(sent[0])) else []
        while frame_reader.has_next:
            heard.append(await frame_reader.next())
        assert heard == sent[: len(heard)] and len(encode_frame(sent[0])) * (len(heard) + 1) > cut
        reader.feed_data(received[cut:])
        heard += [await frame_reader.next() for _ in sent[len(heard) :]]
        assert heard == sent


NOT_MESSAGES = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "another type": msgspec.msgpack.encode([1, 2]),
    "an unknown tag": msgspec.msgpack.encode({"type": "Shutdown"}),
    "a missing field": msgspec.msgpack.encode({"type": "Abort"}),
    "a field of another type": msgspec.msgpack.encode({"type": "Abort", "request_id": 7}),
    "more after the message": msgspec.msgpack.encode(Abort("a")) + b"\x00",
    "text that is none": b"\x82\xa4type\xa5Abort\xaarequest_id\xa2\xff\xff",
    "a value that its field refuses": msgspec.msgpack.encode(
        {
            "type": "Submit",
            "spec": {"request_id": "a", "token_ids": [1], "num_prompt_tokens": 1, "sampling": {"temperature": -1.0}},
        }
    ),
}


@pytest.mark.parametrize("body", NOT_MESSAGES.values(), ids=NOT_MESSAGES)
async def test_a_frame_that_holds_no_message_is_an_error(body: bytes) -> None:
    with pytest.raises(ChannelError, match="known message"):
        await read_all(framed(body))


@given(st.binary(max_size=64), st.booleans())
def test_any_bytes_are_messages_or_an_error(garbage: bytes, as_one_frame: bool) -> None:
    try:
        messages = asyncio.run(read_all(framed(garbage) if as_one_frame else garbage))
    except ChannelError:
        return
    assert all(isinstance(message, ToWorker) for message in messages)


async def test_a_connection_that_is_reset_is_the_end() -> None:
    reader = asyncio.StreamReader()
    reader.set_exception(ConnectionResetError())
    assert await FrameReader(reader, ToWorker).next() is None


@pytest.mark.parametrize("error", [TimeoutError(110, "timed out"), OSError(113, "no route to host")])
async def test_a_connection_whose_other_side_cannot_be_reached_any_more_is_the_end(error: OSError) -> None:
    reader = asyncio.StreamReader()
    reader.set_exception(error)
    assert await FrameReader(reader, ToWorker).next() is None
