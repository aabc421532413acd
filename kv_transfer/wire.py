"""Frames between a reader and a source: 4 bytes of length (big-endian), then one msgpack object with its type.

A ``BlockBytes`` frame is followed by that many raw bytes, so that they go from the socket to their place in one copy.
"""

from __future__ import annotations

from typing import Final

import msgspec

from eagleray.core.errors import TransferError

HEADER_BYTES: Final = 4
MAX_FRAME_BYTES: Final = 16 * 2**20  # more than any announcement; a longer frame is garbage or another protocol

# ---- reader -> source


class Subscribe(msgspec.Struct, frozen=True, tag=True):
    """First frame on a connection: tell me of this request's blocks from ``first_block`` on."""

    request_id: str
    epoch: int  # incarnation of the source that the reader was sent to
    layout_digest: str  # of the reader's own blocks
    first_block: int  # number of blocks that the reader holds already


class ReadBlocks(msgspec.Struct, frozen=True, tag=True):
    """Send the bytes of these announced blocks: block after block, its layer groups in order."""

    slots: tuple[int, ...]


class Received(msgspec.Struct, frozen=True, tag=True):
    """Progress: so many blocks are in and verified."""

    num_blocks: int


class Release(msgspec.Struct, frozen=True, tag=True):
    """All is in: the source may let its blocks go."""


# ---- source -> reader


class BlockNotice(msgspec.Struct, frozen=True, array_like=True):
    """A block that is ready to be read."""

    index: int  # number of the block in the request
    slot: int  # its block id in the source's pool
    fingerprint: bytes  # of the bytes as they lie there


class Announcement(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Blocks that became ready; with ``is_last`` there will be no more."""

    request_id: str
    blocks: tuple[BlockNotice, ...] = ()
    num_tokens: int = 0  # computed at the source so far
    is_last: bool = False
    token_ids: tuple[int, ...] = ()  # with is_last: tokens sampled at the source, to be appended to the known ones
    error: str = ""  # why nothing more will come


class BlockBytes(msgspec.Struct, frozen=True, tag=True):
    """Answer to one ``ReadBlocks``; the raw bytes follow."""

    num_bytes: int


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Nothing is ready yet, but this process runs."""


ToSource = Subscribe | ReadBlocks | Received | Release
ToReader = Announcement | BlockBytes | Heartbeat
Frame = ToSource | ToReader

_decoder: Final = msgspec.msgpack.Decoder(Frame)


def encode_frame(frame: Frame) -> bytes:
    """Header and body. Raises ``TransferError`` when the body is longer than a reader would accept."""
    body = msgspec.msgpack.encode(frame)
    check_frame_length(len(body))
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def decode_length(header: bytes | bytearray) -> int:
    """Length of the body that follows ``header``."""
    num_bytes = int.from_bytes(header, "big")
    check_frame_length(num_bytes)
    return num_bytes


def decode_body(body: bytes | bytearray) -> Frame:
    """Raises ``TransferError`` on anything that is not one of our frames."""
    try:
        frame: Frame = _decoder.decode(body)
    except msgspec.DecodeError as error:  # also: valid msgpack of the wrong shape
        raise TransferError(f"frame of {len(body)} bytes is not of this protocol: {error}") from None
    return frame


def check_frame_length(num_bytes: int) -> None:
    if not 0 < num_bytes <= MAX_FRAME_BYTES:
        raise TransferError(
            f"frame length {num_bytes} is not between 1 and {MAX_FRAME_BYTES}: "
            "the other side is no KV source or reader, or speaks another version"
        )
