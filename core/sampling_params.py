"""Sampling parameters: the one home, under the names that vLLM and OpenAI users know."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from eagleray.core.errors import InvalidRequest

MAX_LOGPROBS: Final = 20
MAX_CHOICES: Final = 128
MIN_TEMPERATURE: Final = 1e-5
# Each new token is compared with all of them on the worker, while other requests wait.
MAX_STOP_STRINGS: Final = 64
MAX_STOP_CHARACTERS: Final = 1024


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token of one request is chosen, and when to stop.

    The next token is a pure function: ``argmax over allowed tokens of logit / temperature + gumbel(seed, choice,
    position, token)``. So the answer does not depend on how the request was batched, split, preempted or resumed.
    Without ``seed`` the router draws one per request.

    Raises ``InvalidRequest`` naming the field, on construction.
    """

    n: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None  # token id -> added to its logit; -100 and below forbids, as OpenAI's
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16  # None: as many as fit into the model's length
    logprobs: int | None = None  # number of alternatives per output token; 0 gives the chosen token's alone
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop: Any = self.stop  # vLLM accepts a bare string, any sequence and None
        msgspec.structs.force_setattr(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._check_ranges()
        self._check_lengths()

    @property
    def is_greedy(self) -> bool:
        """Below ``MIN_TEMPERATURE`` the best token wins by so much that float32 cannot hold the others' chance."""
        return self.temperature < MIN_TEMPERATURE

    def _check_ranges(self) -> None:
        _check("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "must be between 0 and 100")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "must be greater than 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= -1, "must be -1 or 0 (all tokens), or a positive number")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "must be between 0 and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -2.0 <= getattr(self, name) <= 2.0, "must be between -2 and 2")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            0.0 < self.repetition_penalty <= 100.0,
            "must be greater than 0 (1 means none)",
        )
        for token_id, bias in (self.logit_bias or {}).items():
            _check("logit_bias", {token_id: bias}, -100.0 <= bias <= 100.0, "each bias must be between -100 and 100")
        if self.seed is not None:
            _check("seed", self.seed, -(2**63) <= self.seed < 2**63, "must fit into 64 bits")

    def _check_lengths(self) -> None:
        _check("n", self.n, 1 <= self.n <= MAX_CHOICES, f"must be between 1 and {MAX_CHOICES}")
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "must be at least 1")
            _check(
                "min_tokens",
                self.min_tokens,
                self.min_tokens <= self.max_tokens,
                f"must not exceed max_tokens ({self.max_tokens})",
            )
        _check("min_tokens", self.min_tokens, self.min_tokens >= 0, "must not be negative")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, 0 <= value <= MAX_LOGPROBS, f"must be between 0 and {MAX_LOGPROBS}")
        if any(not text for text in self.stop):
            raise InvalidRequest("stop: an empty string would stop at once; leave it out", param="stop")
        if len(self.stop) > MAX_STOP_STRINGS or any(len(text) > MAX_STOP_CHARACTERS for text in self.stop):
            raise InvalidRequest(
                f"stop: at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_CHARACTERS} characters each.",
                param="stop",
            )


def _check(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise InvalidRequest(f"{name}={value!r}: {rule}.", param=name)
