"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eagleray.api.answer import Answer, Choice
from eagleray.api.context import ApiContext
from eagleray.api.limits import check_token_ids
from eagleray.api.logprobs import LogprobsWriter, Scored
from eagleray.api.openai_types import CompletionRequest
from eagleray.api.prepared import PreparedRequest, TokenizedPrompt, answer_options, prepare, sampling_params
from eagleray.api.response_types import CompletionLogprobs
from eagleray.core.errors import InvalidRequest
from eagleray.core.messages import TokenLogprobs, TokenOutput
from eagleray.core.sampling_params import MAX_LOGPROBS


def prepare_completion(body: CompletionRequest, context: ApiContext, trace_parent: str | None) -> PreparedRequest:
    """Check and tokenise; raises ``InvalidRequest``. Slow for long prompts: run it in a thread then."""
    context.check_model(body.model)
    _refuse_unsupported(body)
    echo = bool(body.echo)
    asks_prompt_only = body.max_tokens == 0
    if asks_prompt_only and not echo:
        raise InvalidRequest("max_tokens=0: needs echo=true, else there is nothing to answer.", param="max_tokens")
    given: dict[str, Any] = {"logprobs": _num_logprobs(body)}
    if body.max_tokens is not None:
        given["max_tokens"] = 1 if asks_prompt_only else body.max_tokens  # the model computes the prompt either way
    if echo and given["logprobs"] is not None:
        given["prompt_logprobs"] = max(given["logprobs"], body.prompt_logprobs or 0)
    sampling = sampling_params(body, context, **given)
    return prepare(
        body, context, trace_parent,
        id_prefix="cmpl",
        operation="text_completion",
        options=answer_options(body, echo=echo, show_output=not asks_prompt_only),
        sampling=sampling,
        prompts=_tokenized(body, context, sampling.skip_special_tokens),
    )  # fmt: skip


class CompletionFormat:
    """The shapes of text completions."""

    chunk_object = "text_completion"

    def __init__(self, request: PreparedRequest, context: ApiContext) -> None:
        self._logprobs = LogprobsWriter(context.tokenizer, request.sampling.skip_special_tokens)
        self._with_logprobs = request.sampling.logprobs is not None
        self._options = request.options
        self._streamed: dict[int, int] = {}  # choice -> characters that its log-probabilities cover

    def opening(self, choice: Choice) -> Mapping[str, Any] | None:
        return None

    def delta(self, choice: Choice, output: TokenOutput) -> Mapping[str, Any] | None:
        is_first = choice.index not in self._streamed
        shows = self._options.show_output
        text = "".join(output.texts) if shows else ""
        if is_first and self._options.echo:
            text = choice.prompt.text + text
        logprobs = self._delta_logprobs(choice, (output.logprobs or ()) if shows else (), is_first)
        if not text and output.finish_reason is None and not (logprobs and logprobs["tokens"]):
            return None
        entry = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        if output.finish_reason is not None:
            entry["stop_reason"] = choice.stop_reason
        return entry

    def whole(self, answer: Answer) -> Mapping[str, Any]:
        request = answer.request
        return {
            "id": request.response_id,
            "object": "text_completion",
            "created": request.created_s,
            "model": request.model,
            "choices": [self._choice(choice) for choice in answer.choices],
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._delta_logprobs(choice, choice.scores, is_first=True),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._options.prompt_logprobs:
            entry["prompt_logprobs"] = self._logprobs.prompt(choice.prompt_scores or ())
        return entry

    def _delta_logprobs(
        self, choice: Choice, scores: tuple[TokenLogprobs, ...] | list[TokenLogprobs], is_first: bool
    ) -> CompletionLogprobs | None:
        """Of new tokens; the first time with the echoed prompt's in front."""
        offset = self._streamed.setdefault(choice.index, 0)
        if not self._with_logprobs:
            return None
        scored: list[Scored] = [(score.token_id, score) for score in scores]
        if is_first and self._options.echo:
            unknown = (None,) * len(choice.prompt.token_ids)
            scored[:0] = zip(choice.prompt.token_ids, choice.prompt_scores or unknown, strict=True)
        lists, self._streamed[choice.index] = self._logprobs.completion(scored, offset)
        return lists


def _tokenized(body: CompletionRequest, context: ApiContext, skip_special_tokens: bool) -> list[TokenizedPrompt]:
    """All prompts, in order."""
    prompts = []
    for prompt in _prompt_list(body.prompt):
        if isinstance(prompt, str):
            ids = context.tokenizer.encode(prompt, body.add_special_tokens is not False)
            prompts.append(TokenizedPrompt(prompt, tuple(ids)))
        else:
            check_token_ids(prompt, context.tokenizer.vocab_size, "prompt")
            text = context.tokenizer.decode(prompt, skip_special_tokens) if body.echo else ""
            prompts.append(TokenizedPrompt(text, tuple(prompt)))
    return prompts


def _prompt_list(given: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequest("prompt: is empty; give at least one prompt.", param="prompt")
    if isinstance(given[0], int):
        return [given]
    return given


def _num_logprobs(body: CompletionRequest) -> int | None:
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(f"logprobs={body.logprobs}: must be between 0 and {MAX_LOGPROBS}.", param="logprobs")
    return body.logprobs


def _refuse_unsupported(body: CompletionRequest) -> None:
    """Raises ``InvalidRequest`` for what would change the answer and cannot be served."""
    if body.suffix:
        raise InvalidRequest("suffix: is not supported; leave it out.", param="suffix", code="unsupported_parameter")
    n = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        message = f"best_of={body.best_of}: is only supported equal to n ({n}); ask for n answers and choose."
        raise InvalidRequest(message, param="best_of", code="unsupported_parameter")
