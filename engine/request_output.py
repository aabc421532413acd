"""What a request gave, whole, under vLLM's names; collected from the outputs of an engine or of a cluster."""

from __future__ import annotations

from dataclasses import dataclass, field

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.messages import TokenLogprobs, TokenOutput
from eagleray.core.request import RequestSpec
from eagleray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class CompletionOutput:
    """One answer to one prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    # What guessing ahead brought, where there is a draft: how the answer was made, not what it is.
    acceptance: Acceptance | None = field(default=None, compare=False)

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """All answers to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finished() for output in self.outputs)


class OutputCollector:
    """Adds up what comes for one request, token by token; ``output`` has it so far."""

    def __init__(self, request_id: str, spec: RequestSpec, tokenizer: Tokenizer, prompt: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.output = RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=list(spec.token_ids[: spec.num_prompt_tokens]),
            outputs=[CompletionOutput(index=choice) for choice in range(spec.sampling.n)],
        )

    def add(self, output: TokenOutput) -> None:
        """Take the next output of one answer. Raises ``ValueError`` for one that leaves a gap or comes twice."""
        answer = self.output.outputs[output.choice]
        if output.position != len(answer.token_ids) or answer.finished():
            raise ValueError(f"request {output.request_id}: tokens at {output.position} after {len(answer.token_ids)}")
        if output.choice == 0 and output.position == 0:
            self.output.num_cached_tokens = output.num_cached_tokens or 0
        if output.choice == 0 and output.prompt_logprobs is not None:
            self.output.prompt_logprobs = [
                None if entry is None else self._logprobs(entry) for entry in output.prompt_logprobs
            ]
        answer.token_ids.extend(output.token_ids)
        answer.text += "".join(output.texts)
        answer.acceptance = total_acceptance((answer.acceptance, output.acceptance))
        for entry in output.logprobs or ():
            answer.logprobs = answer.logprobs or []
            answer.logprobs.append(self._logprobs(entry))
            answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + entry.logprob
        if output.finish_reason is not None:
            answer.finish_reason, answer.stop_reason = output.finish_reason.value, output.stop_reason

    def _logprobs(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """By token id, the token itself first."""

        def new_logprob(token_id: int, logprob: float, rank: int) -> Logprob:
            return Logprob(logprob, rank, self._tokenizer.token_text(token_id))

        best = enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1)
        return {entry.token_id: new_logprob(entry.token_id, entry.logprob, entry.rank)} | {
            token_id: new_logprob(token_id, logprob, rank) for rank, (token_id, logprob) in best
        }
