"""A request that has been checked and tokenised: all that is needed to start and to answer it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from eagleray.api.context import ApiContext
from eagleray.api.limits import check_num_choices, check_token_ids, resolve_max_tokens
from eagleray.api.openai_types import GenerationRequest
from eagleray.core.clock import unix_time_s
from eagleray.core.errors import InvalidRequest, ServiceUnavailable
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams

MAX_TEMPERATURE: Final = 2.0  # OpenAI's bound
_TRACE_PARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_SAME_NAME: Final = (
    "n", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p",
    "repetition_penalty", "stop_token_ids", "min_tokens", "ignore_eos", "skip_special_tokens",
    "include_stop_str_in_output", "prompt_logprobs",
)  # fmt: skip


class TokenizedPrompt(msgspec.Struct, frozen=True):
    text: str  # as ``echo`` shows it
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class AnswerOptions:
    """How the answer is shown."""

    stream: bool = False
    include_usage: bool = False  # a last chunk with the usage
    continuous_usage: bool = False  # the usage so far in every chunk
    return_timing: bool = False
    echo: bool = False
    show_output: bool = True  # False for ``max_tokens: 0``, which asks about the prompt only
    prompt_logprobs: bool = False  # the field of that name was asked for


@dataclass(frozen=True)
class PreparedRequest:
    """One HTTP request; several prompts for a batch of completions."""

    response_id: str
    created_s: int
    model: str
    prompts: tuple[TokenizedPrompt, ...]
    specs: tuple[RequestSpec, ...]  # one per prompt
    options: AnswerOptions
    already_s: float = 0.0  # since it arrived

    @property
    def sampling(self) -> SamplingParams:
        return self.specs[0].sampling


def sampling_params(body: GenerationRequest, context: ApiContext, **given: Any) -> SamplingParams:
    """``body`` as ``SamplingParams``, with ``given`` on top; null fields take the defaults there.

    Raises ``InvalidRequest`` naming the field.
    """
    values = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None} | given
    if body.temperature is not None and body.temperature > MAX_TEMPERATURE:
        message = f"temperature={body.temperature}: must be between 0 and {MAX_TEMPERATURE:g}."
        raise InvalidRequest(message, param="temperature")
    if body.stop is not None:
        values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.logit_bias:
        values["logit_bias"] = {_bias_id(key): bias for key, bias in body.logit_bias.items()}
        check_token_ids(values["logit_bias"], context.tokenizer.vocab_size, "logit_bias")
    check_token_ids(body.stop_token_ids or (), context.tokenizer.vocab_size, "stop_token_ids")
    return SamplingParams(**values)


def answer_options(body: GenerationRequest, **given: Any) -> AnswerOptions:
    """How ``body`` wants its answer; raises ``InvalidRequest`` for options that do not go together."""
    stream, wanted = bool(body.stream), body.stream_options
    if wanted is not None and not stream:
        raise InvalidRequest("stream_options: is only allowed with stream=true.", param="stream_options")
    if stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs: cannot be streamed; use stream=false.", param="prompt_logprobs")
    return AnswerOptions(
        stream=stream,
        include_usage=bool(wanted and wanted.include_usage),
        continuous_usage=bool(wanted and wanted.continuous_usage_stats),
        return_timing=bool(body.return_timing),
        prompt_logprobs=body.prompt_logprobs is not None,
        **given,
    )


def prepare(
    body: GenerationRequest,
    context: ApiContext,
    trace_parent: str | None,
    *,
    id_prefix: str,
    operation: Literal["chat", "text_completion"],
    prompts: Sequence[TokenizedPrompt],
    sampling: SamplingParams,
    options: AnswerOptions,
    max_tokens_field: str = "max_tokens",
) -> PreparedRequest:
    """Check lengths and build the specs. ``sampling.max_tokens`` None means as many as fit."""
    asked = None if getattr(body, max_tokens_field) is None else sampling.max_tokens
    check_num_choices(len(prompts), sampling.n)
    status = context.service.status()
    if status.max_model_tokens is None:
        raise ServiceUnavailable(f"The server is starting: {status.reason}; try again in a moment.")
    response_id = f"{id_prefix}-{uuid.uuid4().hex}"
    specs = []
    for index, prompt in enumerate(prompts):
        if not prompt.token_ids:
            raise InvalidRequest("prompt: is empty; give at least one token.", param="prompt")
        length = len(prompt.token_ids)
        limit = resolve_max_tokens(asked, sampling.max_tokens, length, status.max_model_tokens, max_tokens_field)
        specs.append(
            RequestSpec(
                request_id=response_id if len(prompts) == 1 else f"{response_id}-{index}",
                token_ids=prompt.token_ids,
                num_prompt_tokens=length,
                sampling=msgspec.structs.replace(sampling, max_tokens=limit),
                eos_token_ids=context.tokenizer.eos_token_ids,
                priority=body.priority or 0,
                tenant_salt=body.cache_salt or "",
                trace_parent=trace_parent if trace_parent and _TRACE_PARENT.fullmatch(trace_parent) else "",
                operation=operation,
            )
        )
    return PreparedRequest(response_id, unix_time_s(), body.model, tuple(prompts), tuple(specs), options)


def _bias_id(key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        raise InvalidRequest(f"logit_bias: key {key!r} is not a token id.", param="logit_bias")
    return int(key[:20])  # longer ones are out of the vocabulary anyway
