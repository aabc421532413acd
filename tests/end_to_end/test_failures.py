"""Processes are killed or stopped while requests run: no stream loses or doubles a token."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

Service = Any  # of conftest.py, which test modules cannot import
MODEL = "eagleray-demo"
NUM_STREAMS = 6


def request_number(number: int) -> dict[str, object]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Story {number}: " + "what happened next, and why? " * 10}],
        "max_tokens": 160,
        "temperature": 0.8,
        "seed": number,
        "extra_body": {"ignore_eos": True},
    }


async def stream_text(client: openai.AsyncOpenAI, number: int, on_token: Callable[[], None]) -> str:
    parts: list[str] = []
    async for chunk in await client.chat.completions.create(**request_number(number), stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            parts.append(chunk.choices[0].delta.content)
            on_token()
    return "".join(parts)


async def texts_with(service: Service, disturb: Callable[[], Awaitable[None]], after_tokens: int) -> list[str]:
    """Texts of all streams; ``disturb`` happens when so many tokens have come in all."""
    seen = 0
    reached = asyncio.Event()

    def on_token() -> None:
        nonlocal seen
        seen += 1
        if seen >= after_tokens:
            reached.set()

    client = service.new_async_openai()
    tasks = [asyncio.create_task(stream_text(client, number, on_token)) for number in range(NUM_STREAMS)]
    await asyncio.wait_for(reached.wait(), 60)
    await disturb()
    return list(await asyncio.wait_for(asyncio.gather(*tasks), 120))


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> list[str]:
    async def run() -> list[str]:
        return await texts_with(service, lambda: asyncio.sleep(0), 1)

    texts = asyncio.run(run())
    assert len(set(texts)) == NUM_STREAMS
    return texts


def busiest(service: Service, role: str) -> dict[str, object]:
    return max(service.workers(role).values(), key=lambda worker: worker["num_running"] + worker["num_handed_over"])


@pytest.mark.parametrize(("role", "after_tokens"), [("decode", 60), ("prefill", 1)])
async def test_kill_minus_nine_of_a_worker_loses_no_token(
    whole_service: Service, undisturbed: list[str], role: str, after_tokens: int
) -> None:
    async def kill() -> None:
        os.kill(int(str(busiest(whole_service, role)["pid"])), signal.SIGKILL)

    assert await texts_with(whole_service, kill, after_tokens) == undisturbed


async def test_a_stopped_worker_counts_as_dead_after_the_stall_deadline(
    whole_service: Service, undisturbed: list[str]
) -> None:
    pid = int(str(busiest(whole_service, "decode")["pid"]))

    async def stop() -> None:
        nonlocal pid
        pid = int(str(busiest(whole_service, "decode")["pid"]))
        os.kill(pid, signal.SIGSTOP)

    try:
        assert await texts_with(whole_service, stop, 60) == undisturbed
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_redis_killed_while_serving_fails_no_request_and_is_filled_again(
    whole_service: Service, undisturbed: list[str]
) -> None:
    first_pid = whole_service.local.redis_pid

    async def kill() -> None:
        os.kill(first_pid, signal.SIGKILL)

    assert await texts_with(whole_service, kill, 30) == undisturbed
    whole_service.wait_until(lambda: whole_service.local.redis_pid != first_pid, "a new server")

    async def found_again() -> bool:
        answer = await whole_service.new_async_openai().chat.completions.create(
            **{**request_number(0), "max_tokens": 1}
        )
        return bool(answer.usage.prompt_tokens_details.cached_tokens)

    async with asyncio.timeout(30):
        while not await found_again():
            await asyncio.sleep(0.2)
    assert "up" in whole_service.status()["prefix_index"]
