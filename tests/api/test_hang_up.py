from __future__ import annotations

import asyncio
import contextlib

import httpx
import pytest

from eagleray.api.hang_up import HungUp, unless_hung_up

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


@pytest.mark.parametrize("num_turns", range(5))
async def test_a_client_that_goes_when_the_work_ends_cancels_nothing_that_comes_after_it(num_turns: int) -> None:
    loop = asyncio.get_running_loop()
    may_end, may_go = loop.create_future(), loop.create_future()

    async def receive() -> dict[str, str]:
        await may_go
        return {"type": "http.disconnect"}

    async def ask() -> None:
        with contextlib.suppress(HungUp):  # if it goes first
            await unless_hung_up(receive, asyncio.ensure_future(may_end))
        for _ in range(5):
            await asyncio.sleep(0)
        assert asyncio.current_task().cancelling() == 0

    asking = asyncio.create_task(ask())
    await asyncio.sleep(0)
    loop.call_soon(may_end.set_result, None)
    for _ in range(num_turns):
        await asyncio.sleep(0)
    if not may_go.done():  # nobody waits for it any more
        may_go.set_result(None)
    await asyncio.wait_for(asking, DEADLINE_S)


async def test_who_is_cancelled_while_the_client_waits_is_not_told_of_a_hang_up() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    asking = asyncio.create_task(unless_hung_up(asyncio.get_running_loop().create_future, work()))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert ended.is_set()


async def test_hanging_up_in_the_middle_of_the_body_is_no_failure_of_the_server(app, service, caplog) -> None:
    arriving = [{"type": "http.request", "body": b'{"model"', "more_body": True}, {"type": "http.disconnect"}]
    statuses: list[int] = []

    async def receive() -> dict[str, object]:
        return arriving.pop(0)

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"content-type", b"application/json"), (b"content-length", b"99")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    assert statuses == [400] and service.specs == [] and "a request failed" not in caplog.text


async def test_work_that_makes_an_error_of_a_hang_up_leaves_its_task_uncancelled() -> None:
    async def work() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            raise ValueError from None

    async def receive() -> dict[str, object]:
        return {"type": "http.disconnect"}

    with pytest.raises(ValueError):
        await unless_hung_up(receive, work())
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
