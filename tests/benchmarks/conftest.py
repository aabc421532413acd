"""The benchmarks are programs, not a package: their folder goes on the path, as when one of them is run."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn

from eagleray.api.app import create_app
from eagleray.api.context import ApiSettings
from eagleray.core.clock import SystemClock
from eagleray.router.fake_service import FakeGenerationService
from eagleray.text.fake import byte_tokenizer, chatml_template

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "benchmarks" / "kernels"))


@pytest.fixture
def replay_script() -> Path:
    return ROOT / "benchmarks" / "replay.py"


@pytest.fixture(scope="session")
def published_trace() -> Path:
    """The published conversation trace, where somebody put it beside the repository."""
    path = ROOT.parent / "shared" / "traces" / "mooncake_conversation_trace.jsonl.gz"
    if not path.exists():
        pytest.skip("the published trace is not here")
    return path


@pytest.fixture
def service() -> FakeGenerationService:
    return FakeGenerationService(byte_tokenizer(), max_model_tokens=1024)


@pytest.fixture
async def server_url(service: FakeGenerationService) -> AsyncIterator[str]:
    """The real HTTP front over ``service``, in the test's own event loop."""
    async with _http_front(service, api_key=None) as url:
        yield url


@pytest.fixture
async def locked_server_url(service: FakeGenerationService) -> AsyncIterator[str]:
    """The same, which asks for a key."""
    async with _http_front(service, api_key="key-of-the-server") as url:
        yield url


@asynccontextmanager
async def _http_front(service: FakeGenerationService, api_key: str | None) -> AsyncIterator[str]:
    settings = ApiSettings(model="fish", max_body_bytes=100_000, created_s=1_700_000_000, api_key=api_key)
    app = create_app(service, byte_tokenizer(), chatml_template(), settings, SystemClock())
    config = uvicorn.Config(app, port=0, lifespan="off", log_level="warning")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    await server.shutdown()
