"""From sampled tokens to what a user gets: text, stop conditions, log-probabilities, usage, timing.

Everything here is a function of the request and its known tokens, so a request that comes from another worker is
rebuilt by replay and goes on with the next token as if it had never moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from eagleray.core.clock import Clock
from eagleray.core.messages import RequestTiming, TokenLogprobs, TokenOutput
from eagleray.core.request import FinishReason, Request, RequestSpec
from eagleray.engine.scheduling.plan import SampledToken


class TokenText(Protocol):
    """What one token adds to the text."""

    @property
    def text(self) -> str: ...

    @property
    def stop_reason(self) -> str | None:
        """The stop string that the token completes, if any."""
        ...


class TextStream(Protocol):
    """Text of one request's output (``text.output.OutputText``)."""

    def push(self, token_id: int) -> TokenText: ...

    def finish(self) -> str:
        """Text held back until now."""
        ...

    def replay(self, token_ids: list[int]) -> None:
        """Take in output tokens that were emitted before."""
        ...


TextStreamFactory = Callable[[RequestSpec], TextStream]


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that a request has got, and whether it has ended with it, as far as no text is needed to tell."""

    position: int  # among the request's output tokens
    sampled: SampledToken
    finish_reason: FinishReason | None
    stop_reason: int | None


class RequestOutputs:
    """Builds the outputs of one request on one worker."""

    def __init__(self, request: Request, text: TextStream, clock: Clock, max_model_tokens: int) -> None:
        self._request = request
        self._text = text
        self._clock = clock
        self._max_model_tokens = max_model_tokens
        self._accepted_s = clock.now_s()
        self._first_scheduled_s: float | None = None
        self._transfer_s = 0.0
        self._sent_first = False
        wants_prompt_logprobs = request.spec.sampling.prompt_logprobs is not None and request.num_output_tokens == 0
        self._prompt_logprobs: list[TokenLogprobs | None] | None = [None] if wants_prompt_logprobs else None
        text.replay(request.token_ids[request.spec.num_prompt_tokens :])

    def note_committed(self, token_ids: tuple[int, ...], transfer_s: float) -> None:
        """KV came from another worker, which emitted ``token_ids``: the wait for a step begins now."""
        self._text.replay(list(token_ids))
        if token_ids:
            self._prompt_logprobs = None  # they went out with the first token
        self._transfer_s = transfer_s
        self._accepted_s = self._clock.now_s()

    def note_scheduled(self) -> None:
        if self._first_scheduled_s is None:
            self._first_scheduled_s = self._clock.now_s()

    def note_prompt_logprobs(self, start: int, logprobs: list[TokenLogprobs]) -> None:
        """Log-probabilities of prompt tokens ``start + 1`` on; a recomputed run says again what is known."""
        collected = self._prompt_logprobs
        if collected is not None:
            collected.extend(logprobs[len(collected) - (start + 1) :])

    def append(self, sampled: SampledToken) -> NewToken:
        """Append a sampled token to the request. What is to be known before the next step can be scheduled."""
        position = self._request.num_output_tokens
        self._request.token_ids.append(sampled.token_id)
        return NewToken(position, sampled, *self._stop_by_id(sampled.token_id))

    def report(self, new: NewToken) -> TokenOutput:
        """What the user gets of a token. ``finish_reason`` tells if the request has ended with it, also by its text."""
        request, token_id = self._request, new.sampled.token_id
        reason: FinishReason | None = new.finish_reason
        stop_reason: int | str | None = new.stop_reason
        if reason is FinishReason.STOP:  # the token that stops is not text
            text = self._text.finish()
        else:
            piece = self._text.push(token_id)
            text = piece.text
            if piece.stop_reason is not None:
                reason, stop_reason = FinishReason.STOP, piece.stop_reason
            elif reason is FinishReason.LENGTH:
                text += self._text.finish()
        first = not self._sent_first
        self._sent_first = True
        return TokenOutput(
            request_id=request.request_id,
            choice=request.spec.choice,
            position=new.position,
            token_ids=(token_id,),
            texts=(text,),
            logprobs=None if new.sampled.logprobs is None else (new.sampled.logprobs,),
            prompt_logprobs=tuple(self._prompt_logprobs) if first and self._prompt_logprobs is not None else None,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=request.num_cached_tokens if first else None,
            timing=self._timing() if first else None,
        )

    def _stop_by_id(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        request, sampling = self._request, self._request.spec.sampling
        if request.num_output_tokens >= sampling.min_tokens:
            if not sampling.ignore_eos and token_id in request.spec.eos_token_ids:
                return FinishReason.STOP, None
            if token_id in sampling.stop_token_ids:
                return FinishReason.STOP, token_id
        at_limit = sampling.max_tokens is not None and request.num_output_tokens >= sampling.max_tokens
        if at_limit or request.num_tokens >= self._max_model_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def _timing(self) -> RequestTiming:
        now_s = self._clock.now_s()
        scheduled_s = now_s if self._first_scheduled_s is None else self._first_scheduled_s
        return RequestTiming(
            queue_s=scheduled_s - self._accepted_s, prefill_s=now_s - scheduled_s, transfer_s=self._transfer_s
        )
