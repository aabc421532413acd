"""From sampled tokens to what a user gets: text, stop conditions, log-probabilities, usage, timing.

Everything here is a function of the request and its known tokens, so a request that comes from another worker is
rebuilt by replay and goes on with the next token as if it had never moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from eagleray.core.acceptance import Acceptance
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
class NewTokens:
    """What a step brought a request, and whether it has ended with the last, as far as no text is needed to tell."""

    position: int  # of the first among the request's output tokens
    sampled: Sequence[SampledToken]
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

    def append(self, sampled: Sequence[SampledToken]) -> NewTokens:
        """Append a step's tokens to the request, up to one that ends it: what is to be known before the next step can
        be scheduled."""
        position = self._request.num_output_tokens
        reason: FinishReason | None = None
        stop_reason: int | None = None
        for count, token in enumerate(sampled, 1):
            self._request.token_ids.append(token.token_id)
            reason, stop_reason = self._stop_by_id(token.token_id)
            if reason is not None:
                return NewTokens(position, sampled[:count], reason, stop_reason)
        return NewTokens(position, sampled, reason, stop_reason)

    def report(self, new: NewTokens, acceptance: Acceptance | None = None) -> TokenOutput:
        """What the user gets of a step's tokens. ``finish_reason`` tells if the request has ended with the last of
        them, also by its text, which may leave some out."""
        texts: list[str] = []
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        for count, token in enumerate(new.sampled, 1):
            if count == len(new.sampled):
                reason, stop_reason = new.finish_reason, new.stop_reason
            text, stop_string = self._text_of(token.token_id, reason)
            texts.append(text)
            if stop_string is not None:
                reason, stop_reason = FinishReason.STOP, stop_string
                break
        tokens = new.sampled[: len(texts)]
        first = not self._sent_first
        self._sent_first = True
        return TokenOutput(
            request_id=self._request.request_id,
            choice=self._request.spec.choice,
            position=new.position,
            token_ids=tuple(token.token_id for token in tokens),
            texts=tuple(texts),
            logprobs=tuple(token.logprobs for token in tokens if token.logprobs is not None) or None,
            prompt_logprobs=tuple(self._prompt_logprobs) if first and self._prompt_logprobs is not None else None,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=self._request.num_cached_tokens if first else None,
            timing=self._timing() if first else None,
            acceptance=acceptance,
        )

    def _text_of(self, token_id: int, reason: FinishReason | None) -> tuple[str, str | None]:
        """(text that a token releases, the stop string that it completes). ``reason``: it ends the request anyway."""
        if reason is FinishReason.STOP:  # the token that stops is not text
            return self._text.finish(), None
        piece = self._text.push(token_id)
        if reason is FinishReason.LENGTH and piece.stop_reason is None:
            return piece.text + self._text.finish(), None
        return piece.text, piece.stop_reason

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
