"""Frames of the direct channel: four bytes of length, then one msgpack message of ``core/messages.py``."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec

from eagleray.core.errors import EagleRayError

MAX_FRAME_BYTES: Final = 64 * 2**20
_LENGTH_BYTES: Final = 4


class ChannelError(EagleRayError):
    """The other side sent something that is not a frame of this protocol."""


def encode_frame(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ChannelError(f"a {type(message).__name__} of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


async def read_frame(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    """The next message, or None when the other side has closed between two frames or cannot be reached.

    Raises ``ChannelError`` for anything that is not a whole frame of a known message.
    """
    length = 0
    try:
        length = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "big")
        if length > MAX_FRAME_BYTES:
            raise ChannelError(f"a frame announces {length} bytes; the limit is {MAX_FRAME_BYTES}")
        return _decode(decoder, await reader.readexactly(length))
    except asyncio.IncompleteReadError as error:
        if error.partial or length:
            raise ChannelError("the connection closed inside a frame") from None
        return None
    except OSError:  # reset, or timed out, or no route any more
        return None


def _decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, EagleRayError) as error:  # or a value that a field refuses
        raise ChannelError(f"a frame does not hold a known message: {error}") from None
