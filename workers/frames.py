"""Frames of the direct channel: four bytes of length, then one msgpack message of ``core/messages.py``."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

import msgspec

from eagleray.core.errors import EagleRayError

MAX_FRAME_BYTES: Final = 64 * 2**20
_LENGTH_BYTES: Final = 4
_READ_BYTES: Final = 2**20


class ChannelError(EagleRayError):
    """The other side sent something that is not a frame of this protocol."""


def encode_frame(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ChannelError(f"a {type(message).__name__} of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameReader:
    """Messages of one connection. Reads whatever has come at once: a message costs no wake-up of its own."""

    def __init__(self, reader: asyncio.StreamReader, messages: Any) -> None:
        """``messages``: the union of what the other side may send."""
        self._reader = reader
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(messages)
        self._received = bytearray()
        self._bodies: deque[bytes] = deque()

    @property
    def has_next(self) -> bool:
        """A whole message is here: ``next`` will not wait."""
        return bool(self._bodies)

    async def next(self) -> Any:
        """The next message, or None when the other side has closed between two frames or cannot be reached.

        Raises ``ChannelError`` for anything that is not a whole frame of a known message.
        """
        while not self._bodies:
            try:
                data = await self._reader.read(_READ_BYTES)
            except OSError:  # reset, or timed out, or no route any more
                return None
            if not data:
                if self._received:
                    raise ChannelError("the connection closed inside a frame")
                return None
            self._received += data
            self._cut()
        return _decode(self._decoder, self._bodies.popleft())

    def _cut(self) -> None:
        """Move whole frames from what was received to the bodies."""
        received, start = self._received, 0
        while len(received) - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            length = int.from_bytes(received[start:body], "big")
            if length > MAX_FRAME_BYTES:
                raise ChannelError(f"a frame announces {length} bytes; the limit is {MAX_FRAME_BYTES}")
            if len(received) < body + length:
                break
            start = body + length
            self._bodies.append(bytes(received[body:start]))
        del received[:start]


def _decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, EagleRayError) as error:  # or a value that a field refuses
        raise ChannelError(f"a frame does not hold a known message: {error}") from None
