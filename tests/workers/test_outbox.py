"""What is sent arrives whole and in order, whoever reads slowly, and whatever the other side does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from eagleray.workers.frames import ChannelError
from eagleray.workers.outbox import Outbox

MAX_UNSENT_BYTES = 2**24
DEADLINE_S = 10.0


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[Outbox, asyncio.StreamReader]]:
    """An outbox, and the reader at its other end."""
    accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer)

    async with await asyncio.start_server(accept, "127.0.0.1") as server:
        reader, theirs = await asyncio.open_connection(*server.sockets[0].getsockname())
        ours = await accepted
        outbox = Outbox(ours.transport, asyncio.get_running_loop(), MAX_UNSENT_BYTES)
        try:
            yield outbox, reader
        finally:
            outbox.close()
            for writer in (ours, theirs):
                writer.close()


async def test_more_than_the_kernel_takes_waits_and_arrives_in_order() -> None:
    parts = [bytes([number]) * 400_000 for number in range(20)]
    async with connection() as (outbox, reader):
        for part in parts:
            outbox.send(part)
        assert await asyncio.wait_for(reader.readexactly(8_000_000), DEADLINE_S) == b"".join(parts)


async def test_a_reader_that_reads_nothing_is_refused_more_after_the_limit() -> None:
    async with connection() as (outbox, _):
        with pytest.raises(ChannelError, match=f"has not read {MAX_UNSENT_BYTES} bytes"):
            for _ in range(1000):
                outbox.send(bytes(MAX_UNSENT_BYTES))


async def test_sending_after_the_end_says_nothing() -> None:
    async with connection() as (outbox, reader):
        outbox.send(b"last")
        outbox.close()
        outbox.send(b"too late")
        assert await asyncio.wait_for(reader.readexactly(4), DEADLINE_S) == b"last"
