from __future__ import annotations

import httpx
import openai
import pytest

from eagleray.core.errors import Overloaded, ServiceUnavailable

JSON = {"content-type": "application/json"}


def assert_refused(answer: httpx.Response, param: str | None, status: int = 400) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error" and body["error"]["param"] == param
    assert body["error"]["message"]
    return body["error"]


CHAT_FAULTS = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"model": 5}, "model"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 10_000}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"seed": 2**70}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"stop_token_ids": [999]}, "stop_token_ids"),
    ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"temprature": 1}, "temprature"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]  # fmt: skip

COMPLETION_FAULTS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [300]}, "prompt"),
    ({"prompt": [[1, -1]]}, "prompt"),
    ({"prompt": ["a"] * 100, "n": 100}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"top_logprobs": 1}, "top_logprobs"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), CHAT_FAULTS)
async def test_a_faulty_chat_request_is_400_naming_the_field_and_never_a_stream(ask, service, fields, param):
    assert_refused(await ask.chat(**fields), param)
    if "stream_options" not in fields:
        assert_refused(await ask.chat(**fields, **({} if "stream" in fields else {"stream": True})), param)
    assert service.specs == []


@pytest.mark.parametrize(("fields", "param"), COMPLETION_FAULTS)
async def test_a_faulty_completion_request_is_400_naming_the_field(ask, service, fields, param):
    assert_refused(await ask.complete(**fields), param)
    assert service.specs == []


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b'"x"', b"null", b"\xff\xfe{", b"[" * 100_000 + b"]"])
async def test_a_body_that_is_no_json_object_is_400(client, content: bytes):
    assert_refused(await client.post("/v1/completions", content=content[:40_000], headers=JSON), None)


async def test_lone_surrogates_and_numbers_that_are_none_are_400(client):
    for body, param in (
        (b'{"model": "fish", "prompt": "\\ud800"}', "prompt"),
        (b'{"model": "fish", "prompt": "a", "stop": ["\\udfff"]}', "stop"),
        (b'{"model": "fish", "prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"model": "fish", "prompt": "a", "logit_bias": {"5": Infinity}}', "logit_bias"),
    ):
        assert_refused(await client.post("/v1/completions", content=body, headers=JSON), param)


@pytest.mark.parametrize("fields", [{"prompt": "a" * 256}, {"prompt": "a" * 250, "max_tokens": 7}])
async def test_what_does_not_fit_into_the_context_is_400_with_its_code(ask, fields):
    error = assert_refused(await ask.complete(**fields), "max_tokens" if "max_tokens" in fields else "prompt")
    assert error["code"] == "context_length_exceeded" and "256" in error["message"]


async def test_the_default_output_limit_shrinks_to_what_fits(ask):
    assert (await ask.complete("a" * 250)).json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_413(http, service, chunked: bool):
    content = b'{"model": "fish", "prompt": "' + b"a" * 60_000 + b'"}'

    async def pieces():
        yield content[:40_000]
        yield content[40_000:]

    answer = await http.post("/v1/completions", content=pieces() if chunked else content, headers=JSON)
    assert_refused(answer, None, status=413)
    assert service.specs == []


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_that_is_not_declared_json_is_415(client, content_type: str):
    answer = await client.post("/v1/completions", content=b"{}", headers={"content-type": content_type})
    assert "application/json" in assert_refused(answer, None, status=415)["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_overload_and_lack_of_workers_keep_their_status_even_for_streams(ask, service, stream: bool):
    service.script.refuse_with = Overloaded("1024 requests are waiting", retry_after_s=2.4)
    answer = await ask.chat(stream=stream)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    service.script.refuse_with = ServiceUnavailable("no decode worker within 60 s")
    answer = await ask.chat(stream=stream)
    assert answer.status_code == 503 and "no decode worker" in answer.json()["error"]["message"]
    assert service.open_generations == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unexpected_error_is_500_and_tells_nothing_of_our_insides(ask, service, stream: bool):
    service.script.refuse_with = KeyError("secret")
    answer = await ask.chat(stream=stream)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert service.open_generations == 0


async def test_a_generation_that_fails_midway_answers_with_its_status_and_words(ask, service):
    service.script.fail_after_tokens = 2
    answer = await ask.chat()
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the fake failed")


async def test_the_sdk_raises_its_typed_errors(sdk, service):
    async def chat(**fields: object) -> None:
        await sdk.chat.completions.create(**{"model": "fish", "messages": [{"role": "user", "content": "x"}], **fields})

    with pytest.raises(openai.NotFoundError):
        await chat(model="bird")
    with pytest.raises(openai.BadRequestError) as caught:
        await chat(temperature=9, stream=True)
    assert caught.value.param == "temperature"
    service.script.refuse_with = Overloaded("full", 1.0)
    with pytest.raises(openai.RateLimitError):
        await chat()
