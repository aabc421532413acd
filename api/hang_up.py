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
    ended when this returns. Raises ``HungUp``. The request's body must have been read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HungUp
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
