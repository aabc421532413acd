"""The line of requests that found no room: whose turn it is, and how it is left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from eagleray.core.clock import ManualClock
from eagleray.router.waiting_line import WaitingLine

Until = Callable[[Callable[[], object]], Awaitable[None]]


class Waiter:
    """Somebody in the line, who stays at its head until told to go."""

    def __init__(self, line: WaitingLine, ticket: int, deadline_s: float = 5.0) -> None:
        self.is_first = asyncio.Event()
        self.may_go = asyncio.Event()
        self.task = asyncio.create_task(self._wait(line, ticket, deadline_s))

    async def _wait(self, line: WaitingLine, ticket: int, deadline_s: float) -> None:
        async with line.first(ticket, deadline_s):
            self.is_first.set()
            await self.may_go.wait()


async def test_one_after_the_other_in_the_order_of_their_tickets(until: Until) -> None:
    line = WaitingLine(ManualClock())
    tickets = [line.new_ticket() for _ in range(3)]
    head, last, between = (Waiter(line, tickets[place]) for place in (0, 2, 1))
    await until(lambda: len(line) == 3)
    for waiter, behind in ((head, between), (between, last)):
        assert waiter.is_first.is_set() and not behind.is_first.is_set()
        waiter.may_go.set()
        await until(behind.is_first.is_set)
    last.may_go.set()
    await last.task
    assert len(line) == 0


async def test_an_older_ticket_comes_next_but_takes_nobodys_turn(until: Until) -> None:
    line = WaitingLine(ManualClock())
    old, young = line.new_ticket(), line.new_ticket()
    head = Waiter(line, young)
    await until(head.is_first.is_set)
    returned = Waiter(line, old)
    await until(lambda: len(line) == 2)
    assert not returned.is_first.is_set()
    head.may_go.set()
    await until(returned.is_first.is_set)
    returned.may_go.set()
    await returned.task


@pytest.mark.parametrize("leaver", [0, 1])
async def test_whoever_is_cancelled_leaves_the_line_and_the_next_one_moves_up(leaver: int, until: Until) -> None:
    line = WaitingLine(ManualClock())
    waiters = [Waiter(line, line.new_ticket()) for _ in range(3)]
    await until(lambda: len(line) == 3)
    left = waiters.pop(leaver)
    left.task.cancel()
    await asyncio.wait([left.task])
    for waiter in waiters:
        await until(waiter.is_first.is_set)
        waiter.may_go.set()
        await waiter.task
    assert len(line) == 0


async def test_who_waits_too_long_leaves_and_the_others_stay(until: Until) -> None:
    line = WaitingLine(ManualClock())
    head, impatient = Waiter(line, line.new_ticket()), Waiter(line, line.new_ticket(), deadline_s=0.01)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(impatient.task, 5)
    assert len(line) == 1
    head.may_go.set()
    await head.task


async def test_the_wait_that_is_told_is_that_of_the_oldest_or_what_it_was_before(until: Until) -> None:
    clock = ManualClock()
    line = WaitingLine(clock)
    assert line.wait_s == 0.0
    waiter = Waiter(line, line.new_ticket())
    await until(waiter.is_first.is_set)
    clock.advance(3.0)
    assert line.wait_s == 3.0
    waiter.may_go.set()
    await waiter.task
    assert line.wait_s == 3.0
