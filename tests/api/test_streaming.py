from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import Any

import openai
import pytest


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream; checks the framing."""
    assert text.endswith("\n\n")
    blocks = text[:-2].split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]" and text.count("[DONE]") == 1
    return [json.loads(block[6:]) for block in blocks[:-1]]


async def test_the_stream_is_framed_as_events_with_one_id_and_one_done(ask):
    answer = await ask.chat(stream=True, max_tokens=4)
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = events(answer.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("n", [1, 2])
async def test_each_choice_has_its_role_first_and_one_finish_reason_on_its_last_chunk(ask, n: int):
    chunks = events((await ask.chat(stream=True, max_tokens=4, n=n)).text)
    by_choice = defaultdict(list)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        by_choice[choice["index"]].append(choice)
    assert sorted(by_choice) == list(range(n))
    for choices in by_choice.values():
        assert choices[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


@pytest.mark.parametrize("tokens_per_output", [1, 3])
async def test_the_streamed_text_equals_the_whole_text(ask, service, tokens_per_output: int):
    service.script.tokens_per_output = tokens_per_output
    service.script.answer = "Déjà vu: 東京 👩‍👩‍👧 e\u0301!"
    chat = events((await ask.chat(stream=True)).text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chat) == service.script.answer
    completion = events((await ask.complete(stream=True, max_tokens=100)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in completion) == service.script.answer
    assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in completion)


@pytest.mark.parametrize("endpoint", ["chat", "complete"])
async def test_usage_comes_only_when_asked_in_a_last_chunk_without_choices(ask, service, endpoint: str):
    service.script.num_cached_tokens = 3
    whole = await getattr(ask, endpoint)(max_tokens=5, seed=1)
    streamed = await getattr(ask, endpoint)(max_tokens=5, seed=1, stream=True, stream_options={"include_usage": True})
    chunks = events(streamed.text)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole.json()["usage"]
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])


async def test_continuous_usage_counts_up_in_every_chunk(ask):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events((await ask.complete(max_tokens=3, stream=True, stream_options=options)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


async def test_timing_comes_in_a_last_chunk(ask):
    chunks = events((await ask.chat(max_tokens=3, stream=True, return_timing=True)).text)
    assert chunks[-1]["choices"] == [] and chunks[-1]["timing"]["num_output_tokens"] == 3
    assert "usage" not in chunks[-1]


@pytest.mark.parametrize("path", ["chat", "completions"])
async def test_text_arrives_while_the_rest_is_not_there_yet(sdk, service, path: str):
    service.script.pause_after_tokens = 2
    if path == "chat":
        messages = [{"role": "user", "content": "x"}]
        stream = await sdk.chat.completions.create(model="fish", messages=messages, stream=True, max_tokens=5)
    else:
        stream = await sdk.completions.create(model="fish", prompt="x", stream=True, max_tokens=5)
    shown = ""
    async for chunk in stream:
        choice = chunk.choices[0]
        shown += (choice.delta.content if path == "chat" else choice.text) or ""
        if len(shown) == 2:
            assert service.open_generations == 1
            service.script.resume.set()
    assert len(shown) == 5 and service.open_generations == 0


async def test_an_error_in_mid_stream_is_an_event_and_the_end(ask, sdk, service):
    service.script.fail_after_tokens = 2
    text = (await ask.complete(stream=True)).text
    blocks = text.strip().split("\n\n")
    assert len(blocks) == 3 and json.loads(blocks[-1][6:])["error"]["message"] == "the fake failed"
    assert "[DONE]" not in text and service.open_generations == 0
    with pytest.raises(openai.APIError, match="the fake failed"):
        async for _ in await sdk.completions.create(model="fish", prompt="x", stream=True):
            pass


async def test_an_error_before_the_first_token_is_no_stream(ask, service):
    service.script.fail_after_tokens = 0
    assert (await ask.complete(stream=True)).status_code == 503


async def test_sixteen_streams_do_not_mix(sdk):
    async def one(seed: int, stream: bool) -> str:
        answer = await sdk.completions.create(model="fish", prompt="x", seed=seed, max_tokens=30, stream=stream)
        return "".join([chunk.choices[0].text async for chunk in answer]) if stream else answer.choices[0].text

    streamed = await asyncio.gather(*(one(seed, True) for seed in range(16)))
    assert list(streamed) == list(await asyncio.gather(*(one(seed, False) for seed in range(16))))
    assert len(set(streamed)) == 16


async def test_sixty_four_mixed_requests_all_answer(sdk, service):
    async def one(number: int) -> int:
        stream = number % 2 == 0
        if number % 4 < 2:
            messages = [{"role": "user", "content": f"{number}"}]
            answer = await sdk.chat.completions.create(model="fish", messages=messages, stream=stream, max_tokens=9)
        else:
            answer = await sdk.completions.create(model="fish", prompt=f"{number}", stream=stream, max_tokens=9)
        return len([chunk async for chunk in answer]) if stream else len(answer.choices)

    assert all(await asyncio.gather(*map(one, range(64))))
    assert service.open_generations == 0
