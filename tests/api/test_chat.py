from __future__ import annotations

import json
import threading
import time

import httpx
import pytest
from pydantic import TypeAdapter

from eagleray.api.app import create_app
from eagleray.api.chat import prepare_chat
from eagleray.api.context import ApiSettings
from eagleray.api.response_types import ChatCompletion
from eagleray.core.acceptance import Acceptance
from eagleray.core.clock import ManualClock
from eagleray.text.fake import chatml_template


async def content(answer_task) -> str:
    return (await answer_task).json()["choices"][0]["message"]["content"]


async def test_the_answer_has_openais_shape(ask):
    answer = (await ask.chat(max_tokens=5)).json()
    TypeAdapter(ChatCompletion).validate_python(answer)
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert answer["model"] == "fish" and abs(answer["created"] - time.time()) < 60
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant" and choice["message"]["refusal"] is None
    assert len(choice["message"]["content"]) == 5 and choice["finish_reason"] == "length"
    assert "system_fingerprint" not in answer


async def test_usage_adds_up_and_reports_cached_tokens(ask, service):
    service.script.num_cached_tokens = 16
    usage = (await ask.chat(max_tokens=4, n=2)).json()["usage"]
    assert usage["prompt_tokens"] == service.specs[0].num_prompt_tokens
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert usage["prompt_tokens_details"] == {"cached_tokens": 16}


async def test_the_prompt_is_the_rendered_template(ask, service, tokenizer):
    await ask.chat("Hi")
    assert tokenizer.decode(service.specs[0].token_ids, False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_output_limit_work(ask, field: str):
    assert (await ask.chat(**{field: 3})).json()["usage"]["completion_tokens"] == 3


async def test_without_a_limit_the_answer_may_fill_the_models_length(ask, service):
    usage = (await ask.chat()).json()["usage"]
    assert usage["total_tokens"] == 256


async def test_an_answer_that_ends_by_itself_stops(ask, service):
    service.script.answer = "Hello 👩‍👩‍👧!"
    choice = (await ask.chat()).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello 👩‍👩‍👧!", "stop")


async def test_temperature_zero_and_equal_seeds_repeat_and_others_vary(ask):
    assert await content(ask.chat(temperature=0)) == await content(ask.chat(temperature=0))
    assert await content(ask.chat(seed=1)) == await content(ask.chat(seed=1))
    assert await content(ask.chat(seed=1)) != await content(ask.chat(seed=2))
    assert await content(ask.chat()) != await content(ask.chat())


async def test_n_gives_that_many_different_choices_in_order(ask):
    choices = (await ask.chat(n=3, max_tokens=20)).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in choices}) == 3


async def test_every_sampling_field_reaches_the_workers(ask, service):
    fields = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "stop": "x", "max_tokens": 4,
        "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5, "stop_token_ids": [5],
        "include_stop_str_in_output": True, "ignore_eos": True, "min_tokens": 2, "skip_special_tokens": False,
        "prompt_logprobs": 1,
    }  # fmt: skip
    assert (await ask.chat(**fields, logit_bias={"7": -100}, logprobs=True, top_logprobs=2)).status_code == 200
    sampling = service.specs[0].sampling
    for name, value in (fields | {"stop": ("x",), "stop_token_ids": (5,)}).items():
        assert getattr(sampling, name) == value, name
    assert sampling.logit_bias == {7: -100} and sampling.logprobs == 2


async def test_priority_salt_and_trace_travel_with_the_request(client, service, tokenizer):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"model": "fish", "prompt": "a", "priority": -3, "cache_salt": "tenant"}
    for header in (trace, "nonsense"):
        await client.post("/v1/completions", json=body, headers={"traceparent": header})
    spec = service.specs[0]
    assert (spec.priority, spec.tenant_salt, spec.trace_parent) == (-3, "tenant", trace)
    assert service.specs[1].trace_parent == ""
    assert spec.eos_token_ids == tokenizer.eos_token_ids


async def test_logit_bias_forces_a_token(ask, tokenizer):
    token_id = tokenizer.encode("Z")[0]
    assert await content(ask.chat(max_tokens=3, logit_bias={str(token_id): 100})) == "ZZZ"


async def test_null_fields_are_defaults(ask, service):
    fields = dict.fromkeys(["temperature", "top_p", "n", "stop", "seed", "stream", "tools", "logit_bias", "user"])
    assert (await ask.chat(**fields, max_tokens=2)).status_code == 200
    assert service.specs[0].sampling.temperature == 1.0


async def test_openais_fields_without_effect_here_are_accepted(ask):
    fields = {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True,
              "reasoning_effort": "low", "response_format": {"type": "text"}, "tool_choice": "none"}  # fmt: skip
    assert (await ask.chat(**fields, max_tokens=1)).status_code == 200


async def test_text_parts_history_developer_and_tool_messages_are_accepted(ask, service):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    await ask.chat(parts, max_tokens=1)
    await ask.chat("Hi", max_tokens=1)
    assert service.specs[0].token_ids == service.specs[1].token_ids
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    assert (await ask.chat(messages=messages, max_tokens=1)).status_code == 200


async def test_the_last_message_can_be_continued(ask, service, tokenizer):
    messages = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "Once upon"}]
    await ask.chat(messages=messages, max_tokens=1, continue_final_message=True, add_generation_prompt=False)
    assert tokenizer.decode(service.specs[0].token_ids, False).endswith("assistant\nOnce upon")


async def test_the_account_begins_when_the_request_arrives(service, tokenizer, monkeypatch):
    clock, template = ManualClock(), chatml_template()
    render = template.render

    def slow_render(*arguments, **options):
        clock.advance(0.25)
        return render(*arguments, **options)

    monkeypatch.setattr(template, "render", slow_render)
    app = create_app(service, tokenizer, template, ApiSettings("fish", 50_000, 0), clock)
    body = {"model": "fish", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "return_timing": True}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        timing = (await client.post("/v1/chat/completions", json=body)).json()["timing"]
    assert timing["queue_s"] == pytest.approx(0.01 + 0.25)
    assert timing["total_s"] == pytest.approx(0.05 + 0.25)


async def test_timing_comes_when_asked_for(ask):
    assert "timing" not in (await ask.chat(max_tokens=1)).json()
    timing = (await ask.chat(max_tokens=1, return_timing=True)).json()["timing"]
    phases = sum(timing[f"{phase}_s"] for phase in ("queue", "prefill", "transfer", "decode", "network"))
    assert phases == pytest.approx(timing["total_s"])


async def in_pieces(content: bytes):
    """A body whose size no header tells."""
    yield content[:9]
    yield content[9:]


@pytest.mark.parametrize(
    ("bytes_too_many", "has_length", "in_a_thread"),
    [(1, True, True), (0, True, False), (0, False, True)],
    ids=["large", "small", "of unknown size"],
)
async def test_a_prompt_that_may_be_large_is_prepared_in_a_thread_and_answered_the_same(
    client, monkeypatch, bytes_too_many: int, has_length: bool, in_a_thread: bool
):
    prepared_in: list[threading.Thread] = []

    def noting_prepare(*arguments):
        prepared_in.append(threading.current_thread())
        return prepare_chat(*arguments)

    body = json.dumps({"model": "fish", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).encode()
    monkeypatch.setattr("eagleray.api.app.prepare_chat", noting_prepare)
    monkeypatch.setattr("eagleray.api.app.INLINE_BODY_BYTES", len(body) - bytes_too_many)
    content, headers = body if has_length else in_pieces(body), {"content-type": "application/json"}
    answer = (await client.post("/v1/chat/completions", content=content, headers=headers)).json()
    assert answer["usage"]["completion_tokens"] == 2
    event_loops_thread = threading.current_thread()
    assert [thread is not event_loops_thread for thread in prepared_in] == [in_a_thread]


@pytest.mark.parametrize("stream", [False, True])
async def test_timing_tells_what_came_of_guesses_in_counts_and_in_what_follows_from_them(ask, service, stream: bool):
    service.script.acceptance = Acceptance(
        num_steps=10, num_draft_tokens=24, num_accepted_tokens=12, drafts_per_position=(8, 8, 8),
        accepted_per_position=(8, 4), verify_s=1.5, draft_s=0.25,
    )  # fmt: skip
    answer = await ask.chat(max_tokens=1, return_timing=True, stream=stream)
    told = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
    assert told["timing"]["acceptance"] == {
        "num_steps": 10, "num_draft_tokens": 24, "num_accepted_tokens": 12, "drafts_per_position": [8, 8, 8],
        "accepted_per_position": [8, 4], "verify_s": 1.5, "draft_s": 0.25,
        "acceptance_length": 2.5, "rate_per_position": [1.0, 0.5, 0.0],
    }  # fmt: skip


async def test_where_nobody_guesses_timing_says_nothing_of_it(ask):
    assert (await ask.chat(max_tokens=1, return_timing=True)).json()["timing"]["acceptance"] is None


async def test_the_operation_that_a_trace_names_is_that_of_the_endpoint(ask, service):
    await ask.chat()
    await ask.complete()
    assert [spec.operation for spec in service.specs] == ["chat", "text_completion"]
