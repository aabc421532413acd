from __future__ import annotations

import json
import math

import pytest


def chunks(text: str) -> list[dict]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


async def test_chat_logprobs_have_one_entry_per_token_and_spell_the_text(ask, service):
    service.script.answer = "Hé 東"
    choice = (await ask.chat(logprobs=True, top_logprobs=3)).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == len("Hé 東".encode()) + 1  # and the end of the turn, which shows nothing
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        top = [alternative["logprob"] for alternative in entry["top_logprobs"]]
        assert top == sorted(top, reverse=True) and sum(map(math.exp, top)) <= 1
        assert entry["top_logprobs"][0]["token"] == entry["token"]


async def test_logprobs_are_null_when_off_and_without_alternatives_when_none_are_asked_for(ask):
    assert (await ask.chat(max_tokens=1)).json()["choices"][0]["logprobs"] is None
    assert (await ask.complete(max_tokens=1)).json()["choices"][0]["logprobs"] is None
    entry = (await ask.chat(max_tokens=1, logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]
    assert entry["top_logprobs"] == []


@pytest.mark.parametrize("tokens_per_output", [1, 3])
async def test_streamed_chat_logprobs_equal_the_whole_ones(ask, service, tokens_per_output: int):
    service.script.tokens_per_output = tokens_per_output
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 7, "seed": 3, "stop": ["never"]}
    whole = (await ask.chat(**fields)).json()["choices"][0]["logprobs"]["content"]
    streamed = [
        entry
        for chunk in chunks((await ask.chat(**fields, stream=True)).text)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == whole


@pytest.mark.parametrize("echo", [False, True])
async def test_completion_logprobs_are_lists_of_one_length_with_offsets_into_the_text(ask, service, echo: bool):
    service.script.answer = "é b"
    fields = {"logprobs": 2, "echo": echo, "max_tokens": 4}
    choice = (await ask.complete("aé", **fields)).json()["choices"][0]
    lists = choice["logprobs"]
    assert {len(values) for values in lists.values()} == {7 if echo else 4}
    assert lists["text_offset"] == ([0, 1, 2, 2, 3, 3, 4] if echo else [0, 1, 1, 2])
    assert choice["text"][lists["text_offset"][-1] :] == "b"
    assert (lists["token_logprobs"][0] is None) == echo and (lists["top_logprobs"][0] is None) == echo
    assert None not in lists["token_logprobs"][1:]
    stream = await ask.complete("aé", **fields, stream=True)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks(stream.text)]
    for name, values in lists.items():
        assert [value for part in streamed for value in part[name]] == values


async def test_parts_of_characters_have_names_that_differ(ask, service):
    service.script.answer = "東"
    lists = (await ask.complete(logprobs=1, max_tokens=3)).json()["choices"][0]["logprobs"]
    assert lists["tokens"] == ["bytes:\\xe6", "bytes:\\x9d", "bytes:\\xb1"]


async def test_scoring_as_evaluation_programs_do_it(ask):
    """A batch of token ids, echoed, with one token more that is thrown away."""
    fields = {"echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0, "seed": 1234}
    answer = (await ask.complete([[70, 71, 72]], **fields)).json()
    lists = answer["choices"][0]["logprobs"]
    assert len(lists["token_logprobs"]) == 4 and lists["token_logprobs"][0] is None
    for logprob, top in zip(lists["token_logprobs"][1:], lists["top_logprobs"][1:], strict=True):
        assert logprob == max(top.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_max_tokens_zero_scores_the_prompt_only(ask, stream: bool):
    answer = await ask.complete("abc", echo=True, max_tokens=0, logprobs=1, stream=stream)
    (choice,) = (chunks(answer.text)[0] if stream else answer.json())["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    if not stream:
        assert answer.json()["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_come_by_token_id(ask):
    chat = (await ask.chat(max_tokens=1, prompt_logprobs=1)).json()
    assert chat["prompt_logprobs"][0] is None and len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    completion = (await ask.complete("ab", max_tokens=1, prompt_logprobs=0)).json()
    assert completion["choices"][0]["prompt_logprobs"] == [
        None,
        {"101": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}},
    ]
