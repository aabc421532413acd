"""An ingress that is stopped: answers under way end, those that would take too long are broken off."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from eagleray.cluster import http_server
from eagleray.cluster.http_server import HttpServer

SETTLE_DEADLINE_S = 5.0


class Slow:
    """An ASGI application that answers when told to."""

    def __init__(self) -> None:
        self.asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.set()
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"whole"})


async def test_an_answer_under_way_ends_before_the_server_does() -> None:
    app = Slow()
    server = HttpServer(app, "127.0.0.1", 0)
    server.start()
    async with httpx.AsyncClient(timeout=SETTLE_DEADLINE_S) as client:
        asking = asyncio.create_task(client.get(server.address))
        await asyncio.wait_for(app.asked.wait(), SETTLE_DEADLINE_S)
        closing = asyncio.create_task(server.aclose())
        await asyncio.wait([closing], timeout=0.1)
        assert not closing.done()
        app.may_answer.set()
        assert (await asking).text == "whole"
        await asyncio.wait_for(closing, SETTLE_DEADLINE_S)


async def test_an_answer_that_does_not_end_is_broken_off_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "STOP_DEADLINE_S", 0.2)
    app = Slow()
    server = HttpServer(app, "127.0.0.1", 0)
    serving = server.start()
    async with httpx.AsyncClient(timeout=SETTLE_DEADLINE_S) as client:
        asking = asyncio.create_task(client.get(server.address))
        await asyncio.wait_for(app.asked.wait(), SETTLE_DEADLINE_S)
        await asyncio.wait_for(server.aclose(), SETTLE_DEADLINE_S)
        assert serving.done()
        app.may_answer.set()
        await asyncio.wait([asking])
        asking.exception()
