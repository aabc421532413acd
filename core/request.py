"""A request and its life: one class and one table of legal transitions, for the router and every worker.

What was the prompt and what was emitted stays known for ever. So penalties, stops, logprobs and usage can be rebuilt
by replay wherever the request goes on, and preemption, migration and fail-over carry tokens, never hidden state.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal

import msgspec

from eagleray.core.block_hash import BlockHash
from eagleray.core.errors import IllegalTransition
from eagleray.core.sampling_params import SamplingParams


class RequestState(Enum):
    """Where a request is. Schedulers look at token counts only; states say what may happen next."""

    QUEUED = "queued"  # known tokens, no blocks: new, preempted by recompute, or come from a worker that died
    RESERVED = "reserved"  # blocks held under a lease, KV on its way from another worker
    PREFILLING = "prefilling"  # blocks held, computed tokens catch up with known tokens
    DECODING = "decoding"  # has caught up at least once since it got its blocks
    SWAPPED = "swapped"  # KV in host memory
    HANDED_OVER = "handed_over"  # nothing more to compute here; blocks held under a source lease for their reader
    FINISHED = "finished"
    ABORTED = "aborted"

    @property
    def is_final(self) -> bool:
        return self in _FINAL


_FINAL: Final = frozenset({RequestState.FINISHED, RequestState.ABORTED})

TRANSITIONS: Final[dict[RequestState, frozenset[RequestState]]] = {
    RequestState.QUEUED: frozenset({RequestState.RESERVED, RequestState.PREFILLING, RequestState.ABORTED}),
    RequestState.RESERVED: frozenset({RequestState.PREFILLING, RequestState.ABORTED}),
    RequestState.PREFILLING: frozenset(
        {RequestState.DECODING, RequestState.QUEUED, RequestState.SWAPPED, RequestState.ABORTED}
    ),
    RequestState.DECODING: frozenset(
        {
            RequestState.QUEUED,
            RequestState.SWAPPED,
            RequestState.HANDED_OVER,
            RequestState.FINISHED,
            RequestState.ABORTED,
        }
    ),
    RequestState.SWAPPED: frozenset({RequestState.PREFILLING, RequestState.DECODING, RequestState.ABORTED}),
    RequestState.HANDED_OVER: frozenset({RequestState.FINISHED, RequestState.ABORTED}),
    RequestState.FINISHED: frozenset(),
    RequestState.ABORTED: frozenset(),
}


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that a worker needs to compute a request, or to continue it: sent whole, self-sufficient.

    ``token_ids`` is the prompt and whatever was emitted before this worker got the request.
    """

    request_id: str  # opaque to workers; the router makes one per request, choice and attempt
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    choice: int = 0  # tells the n answers of one request apart in the noise
    priority: int = 0  # smaller is sooner
    tenant_salt: str = ""
    trace_parent: str = ""  # W3C traceparent of the request's span, or empty
    operation: Literal["chat", "text_completion"] = "text_completion"  # for its span: gen_ai.operation.name


class Request:
    """A request on one holder (a worker's engine, the router, the simulator)."""

    __slots__ = (
        "arrival_s", "block_hashes", "num_cached_tokens", "num_complete_tokens", "num_computed_tokens",
        "output_limit", "request_id", "spec", "state", "token_ids",
    )  # fmt: skip

    def __init__(self, spec: RequestSpec, arrival_s: float, output_limit: int | None = None) -> None:
        self.spec = spec
        self.request_id = spec.request_id  # asked for many times per token
        self.arrival_s = arrival_s
        self.state = RequestState.QUEUED
        self.token_ids: list[int] = list(spec.token_ids)
        self.num_computed_tokens = 0  # whose KV lies in blocks that this request holds
        self.num_complete_tokens = 0  # of them, those whose KV of a draft lies there as well
        self.num_cached_tokens: int | None = None  # of the prompt, found in the cache at first admission
        self.block_hashes: list[BlockHash] = []  # of the full blocks of token_ids, extended as they fill
        self.output_limit = output_limit  # tokens that this holder emits before it hands over (a prefill worker: 1)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.spec.num_prompt_tokens

    @property
    def num_emitted_here(self) -> int:
        return len(self.token_ids) - len(self.spec.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    def most_tokens(self, max_model_tokens: int) -> int:
        """Known tokens, prompt included, with which it ends whatever they are."""
        max_tokens = self.spec.sampling.max_tokens
        if max_tokens is None:
            return max_model_tokens
        return min(self.spec.num_prompt_tokens + max_tokens, max_model_tokens)

    def move(self, state: RequestState) -> None:
        """Take one legal edge of the state table, or raise ``IllegalTransition``."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"request {self.request_id}: {self.state.value} -> {state.value}")
        self.state = state

    def continuation(self, request_id: str) -> RequestSpec:
        """The spec that lets any other worker go on after the tokens known here."""
        return msgspec.structs.replace(self.spec, request_id=request_id, token_ids=tuple(self.token_ids))
