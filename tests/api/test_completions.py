from __future__ import annotations

import json

import pytest
from pydantic import TypeAdapter

from eagleray.api.response_types import Completion


async def test_the_answer_has_openais_shape_and_sixteen_tokens_by_default(ask):
    answer = (await ask.complete()).json()
    TypeAdapter(Completion).validate_python(answer)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["usage"]["completion_tokens"] == 16


async def test_a_string_and_its_token_ids_are_the_same_prompt(ask, tokenizer):
    ids = tokenizer.encode("Once")
    answers = [(await ask.complete(prompt, seed=1)).json() for prompt in ("Once", ids, [ids], ["Once"])]
    texts = {answer["choices"][0]["text"] for answer in answers}
    assert len(texts) == 1


@pytest.mark.parametrize("batch", [["a", "bb", "ccc"], [[70], [71, 71], [72, 72, 72]]])
async def test_a_batch_is_answered_in_order_with_summed_usage(ask, batch):
    whole = (await ask.complete(batch, max_tokens=4, seed=1)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert whole["usage"]["prompt_tokens"] == 6 and whole["usage"]["completion_tokens"] == 12
    for prompt, choice in zip(batch, whole["choices"], strict=True):
        alone = (await ask.complete(prompt, max_tokens=4, seed=1)).json()
        assert alone["choices"][0]["text"] == choice["text"]


async def test_a_batch_times_n_is_grouped_by_prompt(ask, service):
    choices = (await ask.complete(["a", "b"], n=2, max_tokens=4, echo=True)).json()["choices"]
    assert [choice["text"][0] for choice in choices] == ["a", "a", "b", "b"]
    assert [spec.request_id[-2:] for spec in service.specs] == ["-0", "-1"]


async def test_a_streamed_batch_equals_the_whole_batch(ask):
    fields = {"max_tokens": 5, "seed": 2, "n": 2, "echo": True}
    whole = (await ask.complete(["a", "b"], **fields)).json()["choices"]
    texts = [""] * 4
    for line in (await ask.complete(["a", "b"], **fields, stream=True)).text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole]


async def test_best_of_equal_to_n_and_an_empty_suffix_are_accepted(ask):
    assert (await ask.complete(best_of=2, n=2, suffix="")).status_code == 200


async def test_ignore_eos_gives_the_exact_length_and_min_tokens_the_least(ask, service):
    service.script.answer = "ab"
    for fields, tokens in (({}, 3), ({"ignore_eos": True}, 9), ({"min_tokens": 5}, 5)):
        assert (await ask.complete(max_tokens=9, **fields)).json()["usage"]["completion_tokens"] == tokens


async def test_special_tokens_show_only_when_asked_for(ask, service):
    service.script.answer = "ab"
    texts = [
        (await ask.complete(max_tokens=9, skip_special_tokens=skip)).json()["choices"][0]["text"]
        for skip in (True, False)
    ]
    assert texts == ["ab", "ab<|im_end|>"]


async def test_a_stop_token_ends_the_answer(ask, service, tokenizer):
    service.script.answer = "abc"
    choice = (await ask.complete(max_tokens=9, stop_token_ids=tokenizer.encode("b"))).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")


async def test_the_timing_of_a_batch_is_one_account_per_prompt(ask):
    answer = (await ask.complete(["a", "b"], max_tokens=2, return_timing=True)).json()
    assert [account["num_output_tokens"] for account in answer["timing"]] == [2, 2]
