"""A server whose workers have not connected: the caller is told to come back, not that the request was wrong."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from fastapi import FastAPI

from eagleray.api.app import create_app
from eagleray.api.context import ApiSettings
from eagleray.core.clock import SystemClock
from eagleray.router.fake_service import FakeGenerationService
from eagleray.text.fake import chatml_template
from eagleray.text.tokenizer import Tokenizer

DEADLINE_S = 10.0
BODIES = {
    "/v1/chat/completions": {"model": "fish", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"model": "fish", "prompt": "Once", "max_tokens": 3},
}


@pytest.fixture(params=[None, 256], ids=["starting", "without workers"])
def limit(request: pytest.FixtureRequest) -> int | None:
    """None until the first worker has told how long a request may be."""
    return request.param


@pytest.fixture
def service(tokenizer: Tokenizer, limit: int | None) -> FakeGenerationService:
    return FakeGenerationService(tokenizer, max_model_tokens=limit, ready=False)


@pytest.fixture
def app(service: FakeGenerationService, tokenizer: Tokenizer) -> FastAPI:
    return create_app(service, tokenizer, chatml_template(), ApiSettings("fish", 50_000, 1_700_000_000), SystemClock())


@pytest.mark.parametrize("limit", [None], indirect=True)
@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_worker_it_is_503_with_the_reason_and_when_to_ask_again(
    client: httpx.AsyncClient, service: FakeGenerationService, path: str, stream: bool
) -> None:
    answer = await client.post(path, json={**BODIES[path], "stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert (error["type"], error["code"], error["param"]) == ("server_error", "service_unavailable", None)
    assert "no decode worker" in error["message"]
    assert service.specs == []


@pytest.mark.parametrize("limit", [None], indirect=True)
async def test_the_sdk_sees_an_error_of_the_server(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as error:
        await sdk.chat.completions.create(model="fish", messages=[{"role": "user", "content": "Hi"}])
    assert (error.value.status_code, error.value.type) == (503, "server_error")


@pytest.mark.parametrize("limit", [None], indirect=True)
async def test_a_wrong_request_is_still_wrong(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={**BODIES["/v1/completions"], "temperature": -1})
    assert answer.status_code == 400


@pytest.mark.parametrize("limit", [256], indirect=True)
@pytest.mark.parametrize("path", BODIES)
async def test_with_the_limit_known_a_request_waits_for_a_worker_and_is_served(
    client: httpx.AsyncClient, service: FakeGenerationService, path: str
) -> None:
    service.script.pause_after_tokens = 0
    asking = asyncio.create_task(client.post(path, json=BODIES[path]))
    async with asyncio.timeout(DEADLINE_S):
        while not service.specs:
            await asyncio.sleep(0)
        assert not asking.done()
        service.script.resume.set()
        assert (await asking).status_code == 200


@pytest.mark.parametrize("limit", [256], indirect=True)
async def test_with_the_limit_known_a_prompt_beyond_it_is_refused_at_once(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", json={"model": "fish", "prompt": "word " * 300})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
