"""A trace fitted to a served model: lengths scaled, hash ids turned into tokens, and what an ideal cache would find."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from mooncake import TRACE_BLOCK_TOKENS, TraceRequest

MAX_TOKEN_VALUES: Final = 2**16  # a token is drawn from two bytes


@dataclass(frozen=True)
class Limits:
    """What the served model takes."""

    max_model_tokens: int  # prompt plus output
    kv_block_tokens: int
    token_ids: tuple[int, int]  # first and last id that prompts are made of: ordinary tokens


@dataclass(frozen=True)
class Scaling:
    """How lengths were changed: a trace block of 512 tokens became one of ``block_tokens``."""

    block_tokens: int
    num_cut: int = 0  # requests that did not fit even so; the ends of their prompts were cut off

    @property
    def factor(self) -> float:
        return self.block_tokens / TRACE_BLOCK_TOKENS

    def prompt_tokens(self, row: TraceRequest) -> int:
        """Whole blocks become whole blocks, so that what was shared stays shared."""
        whole, rest = divmod(row.input_length, TRACE_BLOCK_TOKENS)
        return whole * self.block_tokens + (max(1, round(rest * self.factor)) if rest else 0)

    def output_tokens(self, row: TraceRequest) -> int:
        return max(1, round(row.output_length * self.factor))

    def total_tokens(self, row: TraceRequest) -> int:
        return self.prompt_tokens(row) + self.output_tokens(row)


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request to be sent."""

    due_s: float  # since the start of the replay
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival, and what their prompts are made of."""

    requests: tuple[ScheduledRequest, ...]
    scaling: Scaling
    limits: Limits

    def token_ids(self, request: ScheduledRequest) -> list[int]:
        """The prompt: equal hash ids give equal tokens, different ones different tokens."""
        block = partial(block_token_ids, num_tokens=self.scaling.block_tokens, token_ids=self.limits.token_ids)
        tokens = [token_id for hash_id in request.hash_ids for token_id in block(hash_id)]
        return tokens[: request.num_prompt_tokens]


def block_token_ids(hash_id: int, num_tokens: int, token_ids: tuple[int, int]) -> list[int]:
    """The ``num_tokens`` tokens that a hash id stands for: the same on every machine."""
    first, last = token_ids
    noise = hashlib.shake_128(hash_id.to_bytes(8, "little")).digest(2 * num_tokens)
    values: list[int] = (first + np.frombuffer(noise, "<u2") % (last - first + 1)).tolist()
    return values


def build_workload(rows: Sequence[TraceRequest], limits: Limits, speedup: float, scale: float | None) -> Workload:
    """The rows as requests that ``limits`` allow, the first one due at once. ``scale`` None: the longest just fits.

    Blocks keep a multiple of the KV block's size. Prompts that are too long even so lose their ends.
    """
    scaling = fitting_scaling(rows, limits) if scale is None else Scaling(_whole_kv_blocks(scale, limits))
    requests = tuple(_scheduled(row, rows[0].timestamp, speedup, scaling, limits) for row in rows)
    num_cut = sum(scaling.total_tokens(row) > limits.max_model_tokens for row in rows)
    return Workload(requests, Scaling(scaling.block_tokens, num_cut), limits)


def fitting_scaling(rows: Sequence[TraceRequest], limits: Limits) -> Scaling:
    """The largest scale, at most 1, with which every request fits; else that of one KV block per trace block."""
    smallest = limits.kv_block_tokens
    largest = max(smallest, _whole_kv_blocks(1.0, limits))
    for block_tokens in range(largest, smallest, -limits.kv_block_tokens):
        scaling = Scaling(block_tokens)
        if all(scaling.total_tokens(row) <= limits.max_model_tokens for row in rows):
            return scaling
    return Scaling(smallest)


def _whole_kv_blocks(scale: float, limits: Limits) -> int:
    num_kv_blocks = round(scale * TRACE_BLOCK_TOKENS / limits.kv_block_tokens)
    return max(1, num_kv_blocks) * limits.kv_block_tokens


def _scheduled(
    row: TraceRequest, first_ms: float, speedup: float, scaling: Scaling, limits: Limits
) -> ScheduledRequest:
    num_output_tokens = min(scaling.output_tokens(row), max(1, limits.max_model_tokens // 2))
    num_prompt_tokens = min(scaling.prompt_tokens(row), limits.max_model_tokens - num_output_tokens)
    num_blocks = -(-num_prompt_tokens // scaling.block_tokens)
    due_s = (row.timestamp - first_ms) / 1000 / speedup
    return ScheduledRequest(due_s, num_prompt_tokens, num_output_tokens, row.hash_ids[:num_blocks])


@dataclass(frozen=True, slots=True)
class IdealHit:
    """What one unlimited cache that everybody shares would hold of a prompt when it arrives."""

    shared_tokens: int  # in leading blocks that an earlier prompt had
    cacheable_tokens: int  # of those: in whole KV blocks, and never the prompt's last token, which is always computed


def ideal_hits(requests: Iterable[ScheduledRequest], block_tokens: int, kv_block_tokens: int) -> list[IdealHit]:
    """One per request, in order, as if each had been computed before the next one came.

    ``block_tokens`` is the size of what a hash id stands for.
    """
    seen_tokens: dict[int, int] = {}  # hash id -> how much of its block some prompt had
    hits = []
    for request in requests:
        shared, still_shared = 0, True
        for index, hash_id in enumerate(request.hash_ids):
            own = min(block_tokens, request.num_prompt_tokens - index * block_tokens)
            seen = seen_tokens.get(hash_id, 0)
            if still_shared:
                shared += min(own, seen)
            still_shared = still_shared and seen >= own
            seen_tokens[hash_id] = max(own, seen)
        whole_blocks = min(shared, request.num_prompt_tokens - 1) // kv_block_tokens
        hits.append(IdealHit(shared, whole_blocks * kv_block_tokens))
    return hits
