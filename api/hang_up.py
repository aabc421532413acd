"""Work that ends when its client does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Receive

T = TypeVar("T")


class HungUp(Exception):
    """The client closed its connection: nobody reads the answer."""


async def unless_hung_up(receive: Receive, work: Awaitable[T]) -> T:
    """Result of ``work``. When the client disconnects first, or we are cancelled, ``work`` is cancelled and has
    ended when this returns. Raises ``HungUp``. The request's body must have been read.

    ``work`` runs in the caller's task, as under ``asyncio.timeout``: a task of its own would have to be woken, and
    then its caller, for the first token of every answer.
    """
    task = asyncio.current_task()
    assert task is not None
    num_cancelled = task.cancelling()
    is_working, has_hung_up = True, False

    def hang_up(watching: asyncio.Task[None]) -> None:
        nonlocal has_hung_up
        if not watching.cancelled():
            watching.exception()  # a connection that fails is one that has ended
        if is_working:  # else this was on its way already when the work ended
            has_hung_up = True
            task.cancel()

    watching = asyncio.create_task(_disconnected(receive))
    watching.add_done_callback(hang_up)
    try:
        return await work
    except asyncio.CancelledError:
        if has_hung_up and task.cancelling() - 1 <= num_cancelled:
            raise HungUp from None
        raise
    finally:
        is_working = False
        watching.cancel()
        if has_hung_up:  # also where the work made something else of it
            task.uncancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
