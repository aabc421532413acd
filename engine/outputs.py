"""From sampled tokens to what a user gets: text, stop conditions, log-probabilities, usage, timing.

Everything here is a function of the request and its known tokens, so a request that comes from another worker is
rebuilt by replay and goes on with the next token as if it had never moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

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


class NewTokens(msgspec.Struct, frozen=True):
    """What a step brought a request, and whether it has ended with the last, as far as no text is needed to tell."""

    position: int  # of the first among the request's output tokens
    sampled: Sequence[SampledToken]
    finish_reason: FinishReason | None
    stop_reason: int | None


class RequestOutputs:
    """Builds the outputs of one request on one worker."""

    def __init__(self, request: Request, text: TextStream, clock: Clock, max_model_tokens: int) -> None:
        spec, sampling = request.spec, request.spec.sampling
        self._request = request
        self._text = text
        self._clock = clock
        # When it ends, as far as no text is needed to tell: by one of these tokens (and the ``stop_reason`` of each),
        # from so many tokens on, prompt included; and at so many whatever they are.
        eos_ids = () if sampling.ignore_eos else spec.eos_token_ids
        self._stop_reasons: dict[int, int | None] = {id_: id_ for id_ in sampling.stop_token_ids}
        self._stop_reasons.update(dict.fromkeys(eos_ids))
        self._stops_from_tokens = spec.num_prompt_tokens + sampling.min_tokens
        self._max_tokens = request.most_tokens(max_model_tokens)
        self._accepted_s = clock.now_s()
        self._first_scheduled_s: float | None = None
        self._transfer_s = 0.0
        self._has_opened = False
        self._wants_logprobs = sampling.logprobs is not None
        wants_prompt_logprobs = sampling.prompt_logprobs is not None and request.num_output_tokens == 0
        self._prompt_logprobs: list[TokenLogprobs | None] | None = [None] if wants_prompt_logprobs else None
        text.replay(request.token_ids[spec.num_prompt_tokens :])

    def note_committed(self, token_ids: tuple[int, ...], transfer_s: float) -> None:
        """KV came from another worker, which emitted ``token_ids``: the wait for a step begins now."""
        self._text.replay(list(token_ids))
        if token_ids:
            self._prompt_logprobs = None  # they went out with the first token
        self._transfer_s = transfer_s
        self._accepted_s = self._clock.now_s()

    def note_scheduled(self) -> None:
        """The request has got its first run."""
        self._first_scheduled_s = self._clock.now_s()

    def note_prompt_logprobs(self, start: int, logprobs: list[TokenLogprobs]) -> None:
        """Log-probabilities of prompt tokens ``start + 1`` on; a recomputed run says again what is known."""
        collected = self._prompt_logprobs
        if collected is not None:
            collected.extend(logprobs[len(collected) - (start + 1) :])

    def append(self, sampled: Sequence[SampledToken]) -> NewTokens:
        """Append a step's tokens to the request, up to one that ends it: what is to be known before the next step can
        be scheduled."""
        token_ids = self._request.token_ids
        position = len(token_ids) - self._request.spec.num_prompt_tokens
        for count, token in enumerate(sampled, 1):
            token_id = token.token_id
            token_ids.append(token_id)
            if token_id in self._stop_reasons and len(token_ids) >= self._stops_from_tokens:
                return NewTokens(position, sampled[:count], FinishReason.STOP, self._stop_reasons[token_id])
            if len(token_ids) >= self._max_tokens:
                return NewTokens(position, sampled[:count], FinishReason.LENGTH, None)
        return NewTokens(position, sampled, None, None)

    def report(self, new: NewTokens, acceptance: Acceptance | None = None) -> TokenOutput:
        """What the user gets of a step's tokens. ``finish_reason`` tells if the request has ended with the last of
        them, also by its text, which may leave some out."""
        texts, stop_string = self._texts(new)
        sampled = new.sampled[: len(texts)]
        output = TokenOutput(
            request_id=self._request.request_id,
            position=new.position,
            choice=self._request.spec.choice,
            token_ids=tuple([token.token_id for token in sampled]),
            texts=texts,
            logprobs=tuple([t.logprobs for t in sampled if t.logprobs is not None]) if self._wants_logprobs else None,
            finish_reason=new.finish_reason if stop_string is None else FinishReason.STOP,
            stop_reason=new.stop_reason if stop_string is None else stop_string,
            acceptance=acceptance,
        )
        return output if self._has_opened else self._opening(output)

    def _texts(self, new: NewTokens) -> tuple[tuple[str, ...], str | None]:
        """(text that each token releases, the stop string that the last of them completes)."""
        texts: list[str] = []
        ends_by_id = new.finish_reason is FinishReason.STOP
        for token in new.sampled[:-1] if ends_by_id else new.sampled:
            piece = self._text.push(token.token_id)
            texts.append(piece.text)
            if piece.stop_reason is not None:
                return tuple(texts), piece.stop_reason
        if ends_by_id:  # the token that stops is not text
            texts.append(self._text.finish())
        elif new.finish_reason is not None:
            texts[-1] += self._text.finish()
        return tuple(texts), None

    def _opening(self, output: TokenOutput) -> TokenOutput:
        """The first output here, with what is told once."""
        self._has_opened = True
        return msgspec.structs.replace(
            output,
            prompt_logprobs=None if self._prompt_logprobs is None else tuple(self._prompt_logprobs),
            num_cached_tokens=self._request.num_cached_tokens,
            timing=self._timing(),
        )

    def _timing(self) -> RequestTiming:
        now_s = self._clock.now_s()
        scheduled_s = now_s if self._first_scheduled_s is None else self._first_scheduled_s
        return RequestTiming(
            queue_s=scheduled_s - self._accepted_s, prefill_s=now_s - scheduled_s, transfer_s=self._transfer_s
        )
