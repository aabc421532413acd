from __future__ import annotations

import json

import pytest


async def streamed_text(answer) -> str:
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


@pytest.mark.parametrize(
    ("stop", "text", "reason", "stop_reason"),
    [
        ("three", "one two ", "stop", "three"),
        ([" thr", "wo"], "one t", "stop", "wo"),
        (["never", "fourth"], "one two three four", "stop", None),
        ("é", "one two three four", "stop", None),
    ],
)
async def test_stop_strings_end_the_text_and_never_show(ask, service, stop, text, reason, stop_reason):
    service.script.answer = "one two three four"
    choice = (await ask.complete(max_tokens=50, stop=stop)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, reason, stop_reason)
    for tokens_per_output in (1, 3):
        service.script.tokens_per_output = tokens_per_output
        assert await streamed_text(await ask.complete(max_tokens=50, stop=stop, stream=True)) == text


async def test_text_held_back_comes_when_the_limit_ends_the_answer(ask, service):
    service.script.answer = "one two three"
    choice = (await ask.complete(max_tokens=6, stop=["two"])).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one tw", "length")


async def test_the_stop_string_shows_when_asked_for(ask, service):
    service.script.answer = "one two"
    answer = await ask.complete(max_tokens=20, stop="two", include_stop_str_in_output=True)
    assert answer.json()["choices"][0]["text"] == "one two"
