"""A ``GenerationService`` with no workers: deterministic answers and scripted trouble, for tests."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import msgspec

from eagleray.core.acceptance import Acceptance
from eagleray.core.errors import ServiceUnavailable
from eagleray.core.messages import TokenLogprobs, TokenOutput, merged
from eagleray.core.request import FinishReason, RequestSpec
from eagleray.core.telemetry import Phase, TimeAccount
from eagleray.router.service import ServiceStatus
from eagleray.text.output import OutputText
from eagleray.text.tokenizer import Tokenizer

_FORCED_BIAS = 100.0


@dataclass
class FakeScript:
    """What happens to every request from now on. Change it between requests."""

    answer: str | None = None  # this text and then the end; None: letters that depend on prompt, seed and choice
    refuse_with: Exception | None = None  # instead of the first output
    fail_after_tokens: int | None = None  # then ``ServiceUnavailable`` is raised
    pause_after_tokens: int | None = None  # wait there for ``resume``
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    num_cached_tokens: int = 0
    tokens_per_output: int = 1
    acceptance: Acceptance | None = None  # in the account


class FakeGenerationService:
    """Answers from a script. ``open_generations`` counts what was neither finished nor closed."""

    def __init__(self, tokenizer: Tokenizer, max_model_tokens: int | None = 256, ready: bool = True) -> None:
        self.script = FakeScript()
        self.specs: list[RequestSpec] = []
        self.open_generations = 0
        self.all_closed = asyncio.Event()
        self._tokenizer = tokenizer
        self._status = ServiceStatus(
            ready=ready, reason="" if ready else "no decode worker", max_model_tokens=max_model_tokens
        )
        self._output_tokens_total = 0

    def generate(self, spec: RequestSpec, already_s: float = 0.0) -> FakeGeneration:
        self.specs.append(spec)
        if spec.sampling.seed is None:  # a router draws one; a counter is enough here
            sampling = msgspec.structs.replace(spec.sampling, seed=1_000_000 + len(self.specs))
            spec = msgspec.structs.replace(spec, sampling=sampling)
        self.open_generations += 1
        self.all_closed.clear()
        return FakeGeneration(self, spec, self.script, self._tokenizer, already_s)

    def status(self) -> ServiceStatus:
        return self._status

    def metrics_text(self) -> str:
        return f"# TYPE eagleray_output_tokens counter\neagleray_output_tokens_total {self._output_tokens_total}\n"

    def _closed(self, num_output_tokens: int) -> None:
        self._output_tokens_total += num_output_tokens
        self.open_generations -= 1
        if not self.open_generations:
            self.all_closed.set()


class FakeGeneration:
    """One request of the fake service: its choices take turns, one output each."""

    def __init__(
        self,
        service: FakeGenerationService,
        spec: RequestSpec,
        script: FakeScript,
        tokenizer: Tokenizer,
        already_s: float,
    ) -> None:
        self._service, self._spec, self._script, self._tokenizer = service, spec, script, tokenizer
        self._already_s = already_s
        self._is_open = True
        self._num_output_tokens = 0
        self.account: TimeAccount | None = None

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self._outputs()

    async def aclose(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._service._closed(self._num_output_tokens)

    async def _outputs(self) -> AsyncIterator[TokenOutput]:
        await asyncio.sleep(0)
        if self._script.refuse_with is not None:
            raise self._script.refuse_with
        running = [self._choice(choice) for choice in range(self._spec.sampling.n)]
        while running:
            for choice in list(running):
                output = next(choice)
                if output.finish_reason is not None:
                    running.remove(choice)
                if self._script.pause_after_tokens == output.position:
                    await self._script.resume.wait()
                self._num_output_tokens += len(output.token_ids)
                await asyncio.sleep(0)
                if not running:
                    self._finish()
                yield output

    def _finish(self) -> None:
        phases = {**dict.fromkeys(Phase, 0.01), Phase.QUEUE: self._already_s + 0.01}
        self.account = TimeAccount.from_phases(
            phases, total_s=self._already_s + 0.05, time_to_first_token_s=self._already_s + 0.02,
            num_prompt_tokens=self._spec.num_prompt_tokens, num_cached_tokens=self._script.num_cached_tokens,
            num_output_tokens=self._num_output_tokens,
            prefill_worker="prefill-0", decode_worker="decode-0", attempts=1, acceptance=self._script.acceptance,
        )  # fmt: skip
        self._close()

    def _choice(self, choice: int) -> Iterator[TokenOutput]:
        """The outputs of one choice, each of ``tokens_per_output`` tokens but perhaps the last."""
        pending: list[TokenOutput] = []
        for output in self._tokens(choice):
            pending.append(output)
            if len(pending) == self._script.tokens_per_output or output.finish_reason is not None:
                yield from merged(pending)
                pending = []

    def _tokens(self, choice: int) -> Iterator[TokenOutput]:
        spec, text = self._spec, OutputText(self._tokenizer, self._spec.sampling, self._spec.token_ids)
        limit = spec.sampling.max_tokens or (self._service.status().max_model_tokens or 0) - spec.num_prompt_tokens
        for position in range(limit):
            if position == self._script.fail_after_tokens:
                raise ServiceUnavailable("the fake failed")
            token_id = self._token(choice, position)
            piece = text.push(token_id)
            released, stop = piece.text, piece.stop_reason
            reason: FinishReason | None = FinishReason.LENGTH if position + 1 == limit else None
            if stop is not None or self._ends(token_id, position):
                reason = FinishReason.STOP
            yield TokenOutput(
                spec.request_id, position, choice, (token_id,), (released + (text.finish() if reason else ""),),
                logprobs=None if spec.sampling.logprobs is None else (self._scores(token_id, spec.sampling.logprobs),),
                prompt_logprobs=self._prompt_scores() if position == 0 else None,
                finish_reason=reason, stop_reason=stop,
                num_cached_tokens=self._script.num_cached_tokens if position == 0 else None,
            )  # fmt: skip
            if reason is not None:
                return

    def _token(self, choice: int, position: int) -> int:
        sampling = self._spec.sampling
        for token_id, bias in (sampling.logit_bias or {}).items():
            if bias >= _FORCED_BIAS:
                return token_id
        if self._script.answer is not None:
            ids = self._tokenizer.encode(self._script.answer, add_special_tokens=False)
            return ids[position] if position < len(ids) else self._tokenizer.eos_token_ids[0]
        noise = () if sampling.is_greedy else (sampling.seed, choice)
        digest = hashlib.blake2b(repr((self._spec.token_ids, noise, position)).encode(), digest_size=2).digest()
        letter = "abcdefghijklmnopqrstuvwxyz "[int.from_bytes(digest, "little") % 27]
        return self._tokenizer.encode(letter, add_special_tokens=False)[-1]

    def _ends(self, token_id: int, position: int) -> bool:
        sampling = self._spec.sampling
        if token_id in sampling.stop_token_ids:
            return True
        return token_id in self._spec.eos_token_ids and not sampling.ignore_eos and position + 1 >= sampling.min_tokens

    def _scores(self, token_id: int, num_top: int) -> TokenLogprobs:
        """Made up, but proper: the token is the best, and the probabilities sum to less than one."""
        top_ids = tuple((token_id + rank) % self._tokenizer.vocab_size for rank in range(num_top))
        return TokenLogprobs(token_id, -0.5, 1, top_ids, tuple(-0.5 - 2.0 * rank for rank in range(num_top)))

    def _prompt_scores(self) -> tuple[TokenLogprobs | None, ...] | None:
        num_top = self._spec.sampling.prompt_logprobs
        if num_top is None:
            return None
        return (None, *(self._scores(token_id, num_top) for token_id in self._spec.token_ids[1:]))
