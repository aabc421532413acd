"""Frames on a real socket pair: whole, cut, delayed and as garbage."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.core.clock import ManualClock, SystemClock
from eagleray.core.errors import TransferError
from eagleray.kv_transfer.link import Link
from eagleray.kv_transfer.wire import (
    MAX_FRAME_BYTES,
    Announcement,
    BlockBytes,
    BlockNotice,
    Frame,
    Heartbeat,
    ReadBlocks,
    Received,
    Release,
    Subscribe,
    decode_body,
    encode_frame,
)

FRAMES: list[Frame] = [
    Subscribe("r", 3, "digest", 2),
    ReadBlocks((1, 2)),
    Received(4),
    Release(),
    Announcement("r", (BlockNotice(2, 9, b"0123456789abcdef"),), 17, True, (5,)),
    Announcement("r", error="gone"),
    BlockBytes(100),
    Heartbeat(),
]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Link]]:
    """A raw socket, and a link with a short patience at the other end."""
    raw, other = socket.socketpair()
    link = Link(other, SystemClock(), stall_deadline_s=0.2, peer="peer")
    yield raw, link
    link.close()
    raw.close()


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_frame_arrives_as_it_was_sent(ends: tuple[socket.socket, Link], frame: Frame) -> None:
    raw, link = ends
    raw.sendall(encode_frame(frame))
    assert link.wait_for(type(frame)) == frame


def test_frames_that_come_in_small_pieces_are_put_together(ends: tuple[socket.socket, Link]) -> None:
    raw, link = ends
    arrived: list[Frame] = []
    for byte in b"".join(encode_frame(frame) for frame in FRAMES):
        raw.sendall(bytes([byte]))
        frame = link.poll_frame()
        if frame is not None:
            arrived.append(frame)
    assert arrived == FRAMES


def test_raw_bytes_go_into_place_and_frames_before_them_are_kept(ends: tuple[socket.socket, Link]) -> None:
    raw, link = ends
    raw.sendall(encode_frame(Heartbeat()) + encode_frame(BlockBytes(6)) + b"abcdef" + encode_frame(Release()))
    target = bytearray(6)
    assert link.wait_for(BlockBytes) == BlockBytes(6)
    link.receive_into([memoryview(target)[:2], memoryview(target)[2:]])
    assert target == b"abcdef"
    assert [link.poll_frame(), link.poll_frame(), link.poll_frame()] == [Heartbeat(), Release(), None]


def test_a_connection_closed_within_a_frame_is_an_error(ends: tuple[socket.socket, Link]) -> None:
    raw, link = ends
    raw.sendall(encode_frame(FRAMES[0])[:-1])
    raw.close()
    with pytest.raises(TransferError, match="peer closed the connection"):
        link.wait_for(Subscribe)


def test_a_connection_closed_within_raw_bytes_is_an_error(ends: tuple[socket.socket, Link]) -> None:
    raw, link = ends
    raw.sendall(b"abc")
    raw.close()
    with pytest.raises(TransferError, match="closed the connection"):
        link.receive_into([memoryview(bytearray(4))])


def test_a_frame_that_never_ends_is_given_up(ends: tuple[socket.socket, Link]) -> None:
    raw, link = ends
    raw.sendall(encode_frame(Release())[:-1])
    with pytest.raises(TransferError, match=r"no progress for stall_deadline_s=0\.2"):
        link.wait_for(Release)


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_an_impossible_length_is_refused_before_memory_is_taken(ends: tuple[socket.socket, Link], length: int) -> None:
    raw, link = ends
    raw.sendall(length.to_bytes(4, "big"))
    with pytest.raises(TransferError, match=f"frame length {length}"):
        link.wait_for(Release)


@given(st.binary(max_size=64))
def test_garbage_is_a_frame_or_a_transfer_error_and_nothing_else(body: bytes) -> None:
    try:
        decode_body(body)
    except TransferError as error:
        assert "not of this protocol" in str(error)


def test_a_peer_that_takes_nothing_is_given_up(ends: tuple[socket.socket, Link]) -> None:
    _, link = ends
    link.queue(BlockBytes(2**24), [memoryview(bytes(2**24))])
    assert not link.flush()
    with pytest.raises(TransferError, match="no progress"):
        link.send(Release())


def test_a_wait_ends_when_another_thread_limits_it() -> None:
    raw, other = socket.socketpair()
    clock = ManualClock()
    link = Link(other, clock, stall_deadline_s=1000.0, peer="peer")
    link.limit(clock.now_s())
    with pytest.raises(TransferError, match="stopped here"):
        link.wait_for(Release)
    link.close()
    raw.close()


def test_a_large_payload_passes_through_in_the_order_it_was_queued() -> None:
    left, right = socket.socketpair()
    sender, receiver = (Link(end, SystemClock(), 5.0, "peer") for end in (left, right))
    blocks = [bytes([n]) * 50_000 for n in range(100)]
    sender.queue(BlockBytes(5_000_000), [memoryview(block) for block in blocks])
    target = [memoryview(bytearray(50_000)) for _ in blocks]
    sender.flush()
    receiver.wait_for(BlockBytes)
    for view in target:
        sender.flush()
        receiver.receive_into([view])
    assert [bytes(view) for view in target] == blocks
    sender.close()
    receiver.close()


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:port", ":"])
def test_an_address_that_makes_no_sense_is_named(address: str) -> None:
    with pytest.raises(TransferError, match="is not a host:port"):
        Link.connect(address, SystemClock(), 0.2, "source w")
