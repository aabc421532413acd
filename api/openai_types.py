"""Request bodies of the OpenAI-compatible endpoints.

Every field but ``model`` and the prompt may be missing or null: the default then comes from ``SamplingParams`` and
``core/config.py``. Fields of OpenAI's that change nothing here are accepted; a field that nobody knows is refused by
name, so that a misspelt one is not lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

_NOT_UNICODE: Final = "valid Unicode, without lone surrogates"


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "must be {wanted}", {"wanted": _NOT_UNICODE}) from None
    return text


def _described(description: str) -> WrapValidator:
    """One readable error for a union, instead of one per member."""

    def validate(value: Any, members: Callable[[Any], Any]) -> Any:
        try:
            return members(value)
        except ValidationError as error:
            is_text = any(detail["type"] == "string_unicode" for detail in error.errors())
            wanted = _NOT_UNICODE if is_text else description
            raise PydanticCustomError("union", "must be {wanted}", {"wanted": wanted}) from None

    return WrapValidator(validate)


Text = Annotated[str, AfterValidator(_encodable)]
Count = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Prompt = Annotated[
    Text | list[Text] | list[int] | list[list[int]],
    _described("a string, a list of strings, a list of token ids or a list of lists of token ids"),
]
Stop = Annotated[Text | list[Text], _described("a string or a list of strings")]
Content = Annotated[Text | list[dict[str, Any]], _described("a string or a list of content parts")]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(None, description="usage so far in every chunk (vLLM)")
    include_obfuscation: bool | None = Field(None, description="accepted; nothing is obfuscated")


class ChatMessage(BaseModel):
    """One message; fields beyond these go to the model's chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Text
    content: Content | None = None
    name: Text | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Text | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text", "json_object", "json_schema"]


class GenerationRequest(_Body):
    """What both endpoints take: OpenAI's sampling fields, and vLLM's under vLLM's names."""

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    n: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Stop | None = None
    # vLLM's
    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Count | None = None
    add_special_tokens: bool | None = None
    priority: Count | None = Field(None, description="smaller is sooner, under the priority scheduling policy")
    cache_salt: Text | None = Field(None, min_length=1, description="cached prefixes are shared under one salt only")
    # ours
    return_timing: bool | None = Field(None, description="answer with `timing`: where the request's time went")
    # accepted, without effect
    user: Text | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Text | None = None


class ChatCompletionRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables for the chat template")
    modalities: list[Text] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Text | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: Text | dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    # accepted, without effect
    reasoning_effort: Text | None = None
    verbosity: Text | None = None
    prediction: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    logprobs: Count | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: Text | None = None
