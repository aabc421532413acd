"""The HTTP front over the fake service, in a thread: the commands are synchronous."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import uvicorn

from eagleray.api.app import create_app
from eagleray.api.context import ApiSettings
from eagleray.core.clock import ManualClock
from eagleray.router.fake_service import FakeGenerationService
from eagleray.text.fake import byte_tokenizer, chatml_template

DEADLINE_S = 10.0


@dataclass
class FakeServer:
    url: str
    service: FakeGenerationService
    loop: asyncio.AbstractEventLoop

    def wait_all_closed(self) -> None:
        """Until no request runs any more. Raises ``TimeoutError``."""
        asyncio.run_coroutine_threadsafe(self.service.all_closed.wait(), self.loop).result(DEADLINE_S)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running_server(api_key=None) as server:
        yield server


@pytest.fixture
def locked_server() -> Iterator[FakeServer]:
    """It asks for the key ``only-for-friends``."""
    with running_server(api_key="only-for-friends") as server:
        yield server


@contextlib.contextmanager
def running_server(api_key: str | None) -> Iterator[FakeServer]:
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found: list[FakeServer] = []

    async def serve() -> None:
        tokenizer = byte_tokenizer()
        service = FakeGenerationService(tokenizer, max_model_tokens=512)
        settings = ApiSettings(model="fish", max_body_bytes=50_000, created_s=1_700_000_000, api_key=api_key)
        config = uvicorn.Config(
            create_app(service, tokenizer, chatml_template(), settings, ManualClock()),
            port=0,
            lifespan="off",
            log_level="warning",
        )
        config.load()
        front = uvicorn.Server(config)
        front.lifespan = config.lifespan_class(config)
        await front.startup()
        port = front.servers[0].sockets[0].getsockname()[1]
        found.append(FakeServer(f"http://127.0.0.1:{port}", service, loop))
        ready.set()
        await stop.wait()
        await front.shutdown()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(DEADLINE_S)
    yield found[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    loop.close()
