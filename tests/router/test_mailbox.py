"""A mailbox gives its one reader everything that is there, in order, and wakes it once."""

from __future__ import annotations

import asyncio

from eagleray.router.mailbox import Mailbox


async def test_all_that_came_before_is_taken_at_once_and_in_order() -> None:
    mailbox = Mailbox[int]()
    for item in range(3):
        mailbox.put(item)
    assert await asyncio.wait_for(mailbox.take(), 5) == [0, 1, 2]


async def test_a_waiting_reader_is_woken_once_for_all_that_comes_in_one_turn() -> None:
    mailbox, taken = Mailbox[int](), []

    async def read() -> None:
        while 9 not in (items := await mailbox.take()):
            taken.append(items)

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    mailbox.put(1)
    mailbox.put(2)
    await asyncio.sleep(0)
    mailbox.put(9)
    await asyncio.wait_for(reading, 5)
    assert taken == [[1, 2]]


async def test_a_reader_that_is_cancelled_loses_nothing() -> None:
    mailbox = Mailbox[int]()
    reading = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.put(1)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert await asyncio.wait_for(mailbox.take(), 5) == [1]
