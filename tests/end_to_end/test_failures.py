"""Processes are killed or stopped while requests run: no stream loses or doubles a token."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
import redis

Service = Any  # of conftest.py, which test modules cannot import
MODEL = "eagleray-demo"
NUM_STREAMS = 6


SHORT, LONG = 10, 60  # sentences of a prompt; a long one takes several chunks
RESUMED = "eagleray_requests_resumed_total"


def request_number(number: int, sentences: int, cache_salt: str) -> dict[str, object]:
    """What is cached under one salt is not found under another: the prompt is computed again, to the same tokens."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"Story {number}: " + "what happened next, and why? " * sentences}],
        "max_tokens": 160,
        "temperature": 0.8,
        "seed": number,
        "extra_body": {"ignore_eos": True, "cache_salt": cache_salt},
    }


async def stream_text(client: openai.AsyncOpenAI, request: dict[str, object], on_token: Callable[[], None]) -> str:
    parts: list[str] = []
    async for chunk in await client.chat.completions.create(**request, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            parts.append(chunk.choices[0].delta.content)
            on_token()
    return "".join(parts)


async def texts_with(
    service: Service, disturb: Callable[[], Awaitable[None]], after_tokens: int = 0, sentences: int = SHORT
) -> list[str]:
    """Texts of all streams, none of them cached before; ``disturb`` begins when so many tokens have come in all."""
    seen = 0
    reached = asyncio.Event()

    def on_token() -> None:
        nonlocal seen
        seen += 1
        if seen >= after_tokens:
            reached.set()

    client, salt = service.new_async_openai(), uuid.uuid4().hex
    requests = [request_number(number, sentences, salt) for number in range(NUM_STREAMS)]
    tasks = [asyncio.create_task(stream_text(client, request, on_token)) for request in requests]
    if after_tokens:
        await asyncio.wait_for(reached.wait(), 60)
    await disturb()
    return list(await asyncio.wait_for(asyncio.gather(*tasks), 120))


async def undisturbed_texts(service: Service, sentences: int) -> list[str]:
    texts = await texts_with(service, lambda: asyncio.sleep(0), sentences=sentences)
    assert len(set(texts)) == NUM_STREAMS
    return texts


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> list[str]:
    return asyncio.run(undisturbed_texts(service, SHORT))


def busiest(service: Service, role: str, by: str = "num_running") -> dict[str, Any]:
    return max(service.workers(role).values(), key=lambda worker: worker[by])


async def test_kill_minus_nine_of_a_decode_worker_loses_no_token(
    whole_service: Service, undisturbed: list[str]
) -> None:
    resumed = whole_service.metric(RESUMED)

    async def kill() -> None:
        victim = busiest(whole_service, "decode")
        assert victim["num_running"] > 0
        os.kill(victim["pid"], signal.SIGKILL)

    assert await texts_with(whole_service, kill, after_tokens=60) == undisturbed
    assert whole_service.metric(RESUMED) > resumed


async def test_kill_minus_nine_of_a_prefill_worker_in_the_middle_of_its_prompts_loses_no_token(
    whole_service: Service,
) -> None:
    expected = await undisturbed_texts(whole_service, LONG)
    whole_service.wait_until_whole()

    def noticed() -> float:
        failures = sum(worker["transfer_failures_total"] for worker in whole_service.workers("decode").values())
        return failures + whole_service.metric(RESUMED)

    def kill_at_work() -> None:
        deadline_s = time.monotonic() + 30
        while (victim := busiest(whole_service, "prefill", by="uncomputed_tokens"))["uncomputed_tokens"] < 256:
            assert time.monotonic() < deadline_s, "no prefill worker was ever seen at work"
        os.kill(victim["pid"], signal.SIGKILL)

    before = noticed()
    assert await texts_with(whole_service, lambda: asyncio.to_thread(kill_at_work), sentences=LONG) == expected
    assert noticed() > before, "nobody missed the worker that was killed"


async def test_a_stopped_worker_counts_as_dead_after_the_stall_deadline(
    whole_service: Service, undisturbed: list[str]
) -> None:
    stopped: list[int] = []
    resumed = whole_service.metric(RESUMED)

    async def stop() -> None:
        victim = busiest(whole_service, "decode")
        assert victim["num_running"] > 0
        stopped.append(victim["pid"])
        os.kill(victim["pid"], signal.SIGSTOP)

    try:
        assert await texts_with(whole_service, stop, after_tokens=60) == undisturbed
        assert whole_service.metric(RESUMED) > resumed
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has been replaced
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


async def test_redis_killed_while_serving_fails_no_request_and_is_filled_again(
    whole_service: Service, undisturbed: list[str]
) -> None:
    first_pid = whole_service.local.redis_pid
    before = indexed_prefixes(whole_service)
    request = request_number(0, SHORT, cache_salt="asked before the server died, and never again")
    await whole_service.new_async_openai().chat.completions.create(**request)
    whole_service.wait_until(lambda: indexed_prefixes(whole_service) - before, "the prompt is in the index")
    asked_once = indexed_prefixes(whole_service) - before

    async def kill() -> None:
        os.kill(first_pid, signal.SIGKILL)

    assert await texts_with(whole_service, kill, after_tokens=30) == undisturbed
    whole_service.wait_until(lambda: whole_service.local.redis_pid != first_pid, "a new server")
    whole_service.wait_until(lambda: asked_once <= indexed_prefixes(whole_service), "the workers told the new one")
    whole_service.wait_until(lambda: "up" in whole_service.status()["prefix_index"], "the index is asked again")


def indexed_prefixes(service: Service) -> set[bytes]:
    """Keys of the first blocks that the index's server knows; none while there is no server."""
    try:
        with redis.Redis.from_url(service.local.config.index.url) as server:
            return set(server.scan_iter("kv:{*"))
    except redis.ConnectionError:
        return set()
