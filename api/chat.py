"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eagleray.api.answer import Answer, Choice
from eagleray.api.context import ApiContext
from eagleray.api.logprobs import LogprobsWriter
from eagleray.api.openai_types import ChatCompletionRequest
from eagleray.api.prepared import PreparedRequest, TokenizedPrompt, answer_options, prepare, sampling_params
from eagleray.core.errors import InvalidRequest
from eagleray.core.messages import TokenOutput
from eagleray.core.sampling_params import MAX_LOGPROBS


def prepare_chat(body: ChatCompletionRequest, context: ApiContext, trace_parent: str | None) -> PreparedRequest:
    """Check, template and tokenise; raises ``InvalidRequest``. Slow for long prompts: run it in a thread then."""
    context.check_model(body.model)
    _refuse_unsupported(body)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens: int | None = getattr(body, field)
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"{field}={max_tokens}: must be at least 1.", param=field)
    return prepare(
        body, context, trace_parent,
        id_prefix="chatcmpl",
        operation="chat",
        options=answer_options(body),
        sampling=sampling_params(body, context, max_tokens=max_tokens, logprobs=_num_top_logprobs(body)),
        prompts=[_tokenized(body, context)],
        max_tokens_field=field,
    )  # fmt: skip


class ChatFormat:
    """The shapes of chat completions."""

    chunk_object = "chat.completion.chunk"

    def __init__(self, request: PreparedRequest, context: ApiContext) -> None:
        self._logprobs = LogprobsWriter(context.tokenizer, request.sampling.skip_special_tokens)
        self._with_logprobs = request.sampling.logprobs is not None
        self._with_prompt_logprobs = request.options.prompt_logprobs

    def opening(self, choice: Choice) -> Mapping[str, Any] | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, choice: Choice, output: TokenOutput) -> Mapping[str, Any] | None:
        text = "".join(output.texts)
        if not text and output.finish_reason is None and not output.logprobs:
            return None
        entry: dict[str, Any] = {
            "index": choice.index,
            "delta": {"content": text} if text or output.logprobs else {},
            "logprobs": self._logprobs.chat(output.logprobs) if output.logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        if output.finish_reason is not None:
            entry["stop_reason"] = choice.stop_reason
        return entry

    def whole(self, answer: Answer) -> Mapping[str, Any]:
        request = answer.request
        body: dict[str, Any] = {
            "id": request.response_id,
            "object": "chat.completion",
            "created": request.created_s,
            "model": request.model,
            "choices": [self._choice(choice) for choice in answer.choices],
        }
        if self._with_prompt_logprobs:
            body["prompt_logprobs"] = self._logprobs.prompt(answer.choices[0].prompt_scores or ())
        return body

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs.chat(choice.scores) if self._with_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }


def _tokenized(body: ChatCompletionRequest, context: ApiContext) -> TokenizedPrompt:
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        message = "continue_final_message: cannot be combined with add_generation_prompt=true."
        raise InvalidRequest(message, param="continue_final_message")
    text = context.template.render(
        [message.model_dump(exclude_unset=True) for message in body.messages],
        add_generation_prompt=not continues and body.add_generation_prompt is not False,
        continue_final_message=continues,
        variables=body.chat_template_kwargs,
    )
    return TokenizedPrompt(text, tuple(context.tokenizer.encode(text, bool(body.add_special_tokens))))


def _num_top_logprobs(body: ChatCompletionRequest) -> int | None:
    if body.top_logprobs is None:
        return 0 if body.logprobs else None
    if not body.logprobs:
        raise InvalidRequest("top_logprobs: is only allowed with logprobs=true.", param="top_logprobs")
    if not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        message = f"top_logprobs={body.top_logprobs}: must be between 0 and {MAX_LOGPROBS}."
        raise InvalidRequest(message, param="top_logprobs")
    return body.top_logprobs


def _refuse_unsupported(body: ChatCompletionRequest) -> None:
    """Raises ``InvalidRequest`` for what would change the answer and cannot be served."""
    calls_tools = body.tool_choice not in (None, "none", "auto")
    unsupported = {
        "tools": bool(body.tools) and body.tool_choice != "none",
        "tool_choice": calls_tools,
        "functions": bool(body.functions),
        "function_call": body.function_call not in (None, "none"),
        "response_format": body.response_format is not None and body.response_format.type != "text",
        "modalities": body.modalities not in (None, [], ["text"]),
        "audio": body.audio is not None,
        "web_search_options": body.web_search_options is not None,
    }
    for field, is_asked in unsupported.items():
        if is_asked:
            message = f"{field}: is not supported yet; leave it out."
            raise InvalidRequest(message, param=field, code="unsupported_parameter")
