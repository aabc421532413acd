"""The application over the fake service: in process, and behind a real server on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from eagleray.api.app import create_app
from eagleray.api.context import ApiSettings
from eagleray.core.clock import SystemClock
from eagleray.router.fake_service import FakeGenerationService
from eagleray.text.fake import byte_tokenizer, chatml_template
from eagleray.text.tokenizer import Tokenizer

MODEL = "fish"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def service(tokenizer: Tokenizer) -> FakeGenerationService:
    return FakeGenerationService(tokenizer, max_model_tokens=256)


@pytest.fixture
def app(service: FakeGenerationService, tokenizer: Tokenizer) -> FastAPI:
    settings = ApiSettings(model=MODEL, max_body_bytes=50_000, created_s=1_700_000_000)
    return create_app(service, tokenizer, chatml_template(), settings, SystemClock())


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """In process: answers arrive whole."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=10) as client:
        yield client


@pytest.fixture
async def server_url(app: FastAPI) -> AsyncIterator[str]:
    """A real server in the test's own event loop, so that tests can steer the service directly."""
    config = uvicorn.Config(app, port=0, lifespan="off", log_level="warning")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    await server.shutdown()


@pytest.fixture
async def http(server_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server_url, timeout=10) as client:
        yield client


@pytest.fixture
async def sdk(server_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


class Requests:
    """Shortest way to ask."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def chat(self, text: str = "Hi", **fields: object) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
        return await self._client.post("/v1/chat/completions", json=body)

    async def complete(self, prompt: object = "Once", **fields: object) -> httpx.Response:
        return await self._client.post("/v1/completions", json={"model": MODEL, "prompt": prompt, **fields})


@pytest.fixture
def ask(client: httpx.AsyncClient) -> Requests:
    return Requests(client)
