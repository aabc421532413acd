"""What all policies agree on: tokens that need computing, room, ties, and when a decode worker prefills by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from eagleray.router.view import ClusterView, Route, RoutingRequest, WorkerView

AGGREGATED: Final = "no prefill worker"


def uncached_tokens(request: RoutingRequest, worker: WorkerView) -> int:
    """Tokens that ``worker`` has to compute; at least the last one, whose logits choose the next."""
    cached = worker.cached_tokens if request.reads_cache else 0
    return max(request.num_tokens - cached, 1)


def backlog_tokens(worker: WorkerView) -> int:
    """Tokens ahead of a new request's prefill."""
    return worker.snapshot.uncomputed_tokens + worker.pending_tokens


def num_requests(worker: WorkerView) -> int:
    """Requests the worker has or is about to get."""
    snapshot = worker.snapshot
    return snapshot.num_waiting + snapshot.num_running + snapshot.num_reserved + worker.pending_requests


def lacks_room(worker: WorkerView, num_tokens: int, block_size_tokens: int) -> bool:
    """Whether a request of ``num_tokens`` finds too few free blocks, after those that this ingress just sent."""
    needed = math.ceil(num_tokens / block_size_tokens) + math.ceil(worker.pending_held_tokens / block_size_tokens)
    return worker.snapshot.blocks_free < needed


def lacks_room_to_decode(request: RoutingRequest, worker: WorkerView) -> bool:
    return lacks_room(worker, request.num_tokens + request.max_new_tokens, request.block_size_tokens)


def lacks_room_to_prefill(request: RoutingRequest, worker: WorkerView) -> bool:
    return lacks_room(worker, request.num_tokens, request.block_size_tokens)


def rotated(workers: Mapping[str, WorkerView], sequence: int) -> list[WorkerView]:
    """All workers in the order of their ids, beginning at another one for each request: who is first wins ties."""
    ordered = [workers[worker_id] for worker_id in sorted(workers)]
    start = sequence % len(ordered) if ordered else 0
    return ordered[start:] + ordered[:start]


def short_suffix(request: RoutingRequest, view: ClusterView, decode: WorkerView) -> str | None:
    """Why ``decode`` should prefill by itself, whatever the policy; None when that is the policy's choice."""
    if not view.prefill:
        return AGGREGATED
    uncached = uncached_tokens(request, decode)
    if uncached <= view.local_prefill_tokens:
        return f"only {uncached} uncached tokens"
    return None


def route_pair(
    request: RoutingRequest,
    view: ClusterView,
    choose_decode: Callable[[Iterable[WorkerView]], WorkerView],
    choose_prefill: Callable[[Iterable[WorkerView]], WorkerView],
    reason: str,
) -> Route | None:
    """Decode worker first, then a prefill worker unless the decode worker does both."""
    if not view.decode:
        return None
    decode = choose_decode(rotated(view.decode, request.sequence))
    local = short_suffix(request, view, decode)
    if local is not None:
        return Route(decode.worker_id, None, f"{reason}; {local}")
    prefill = choose_prefill(rotated(view.prefill, request.sequence))
    return Route(decode.worker_id, prefill.worker_id, reason)


def least(key: Callable[[WorkerView], Any]) -> Callable[[Iterable[WorkerView]], WorkerView]:
    """Chooses the worker with the smallest ``key``; the first of several."""
    return lambda workers: min(workers, key=key)
