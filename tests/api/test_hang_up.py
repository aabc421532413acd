from __future__ import annotations

import asyncio

import httpx
import pytest

DEADLINE_S = 5.0


async def closed(service) -> None:
    await asyncio.wait_for(service.all_closed.wait(), DEADLINE_S)


@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
async def test_hanging_up_on_a_stream_closes_the_generation(http, service, prompt):
    service.script.pause_after_tokens = 2
    body = {"model": "fish", "prompt": prompt, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        await anext(answer.aiter_lines())
        assert service.open_generations == (1 if prompt == "x" else 2)
    await closed(service)


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_before_the_first_token_closes_the_generation(server_url, service, stream: bool):
    service.script.pause_after_tokens = 0
    started = asyncio.Event()
    generate = service.generate

    def noticed(spec, already_s):
        started.set()
        return generate(spec, already_s)

    service.generate = noticed
    async with httpx.AsyncClient(base_url=server_url, timeout=10) as http:
        body = {"model": "fish", "prompt": "x", "stream": stream}
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        await asyncio.wait_for(started.wait(), DEADLINE_S)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await closed(service)


async def test_a_batch_is_closed_whole_when_one_of_it_fails(http, service):
    service.script.fail_after_tokens = 1
    answer = await http.post("/v1/completions", json={"model": "fish", "prompt": ["x", "y", "z"]})
    assert answer.status_code == 503
    assert service.open_generations == 0
