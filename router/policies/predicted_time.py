"""Each request to the pair of workers that is predicted to serve it soonest, the harm to others included."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from eagleray.router.policies.rules import (
    backlog_tokens,
    lacks_room_to_decode,
    lacks_room_to_prefill,
    num_requests,
    rotated,
    short_suffix,
    uncached_tokens,
)
from eagleray.router.view import ClusterView, Route, RoutingRequest, WorkerView


@dataclass(frozen=True)
class PredictedTime:
    """Compares seconds: queue + prefill of what is not cached + what of the transfer does not hide + decode.

    Rates come from the workers' snapshots. A worker that has measured nothing counts as the mean of those that have,
    and where none has, as the defaults below: their size matters little while all workers share them.
    """

    default_prefill_tokens_per_s: float = 5000.0
    default_decode_step_s: float = 0.03  # of an empty worker
    step_growth_per_request: float = 0.02  # a decode step reads the weights once, and each request's KV
    horizon_tokens: int = 64  # output tokens that count: lengths are unknown, and load moves on

    def choose(self, request: RoutingRequest, view: ClusterView) -> Route | None:
        if not view.decode:
            return None
        rates = self._prefill_rates(view)
        decode_sides = self._decode_sides(request, view)
        prefill_sides = [
            _PrefillSide(
                worker=worker,
                lacks_room=lacks_room_to_prefill(request, worker),
                queue_s=backlog_tokens(worker) / rates[worker.worker_id],
                prefill_s=uncached_tokens(request, worker) / rates[worker.worker_id],
            )
            for worker in rotated(view.prefill, request.sequence)
        ]
        options = [_prefilled_locally(request, decode, rates[decode.worker.worker_id]) for decode in decode_sides]
        for decode in decode_sides:
            if decode.local_reason is None:
                options.extend(_prefilled_elsewhere(view, decode, prefill) for prefill in prefill_sides)
        return min(options, key=lambda option: option.rank).route()

    def _prefill_rates(self, view: ClusterView) -> dict[str, float]:
        """Tokens per second by worker: measured, else its pool's mean, else that of all, else the default."""
        pools = (view.prefill, view.decode)
        measured = [[worker.snapshot.prefill_tokens_per_s for worker in pool.values()] for pool in pools]
        anywhere = _mean_of_measured(measured[0] + measured[1], self.default_prefill_tokens_per_s)
        usual = [_mean_of_measured(rates, anywhere) for rates in measured]
        return {
            worker.worker_id: worker.snapshot.prefill_tokens_per_s or usual_of_pool
            for pool, usual_of_pool in zip(pools, usual, strict=True)
            for worker in pool.values()
        }

    def _decode_sides(self, request: RoutingRequest, view: ClusterView) -> list[_DecodeSide]:
        empty_step_s = {worker_id: self._empty_step_s(worker) for worker_id, worker in view.decode.items()}
        usual_s = _mean_of_measured(empty_step_s.values(), self.default_decode_step_s)
        horizon = min(request.max_new_tokens, self.horizon_tokens)
        return [
            _DecodeSide(
                worker=worker,
                lacks_room=lacks_room_to_decode(request, worker),
                local_reason=short_suffix(request, view, worker),
                missing_blocks=math.ceil((request.num_tokens - worker.cached_tokens) / request.block_size_tokens),
                decode_s=horizon * (empty_step_s[worker.worker_id] or usual_s) * self._growth(num_requests(worker) + 1),
            )
            for worker in rotated(view.decode, request.sequence)
        ]

    def _growth(self, requests: int) -> float:
        return 1 + self.step_growth_per_request * requests

    def _empty_step_s(self, worker: WorkerView) -> float:
        """What the worker's step would take without any request, so that workers compare; 0 when not measured."""
        return worker.snapshot.decode_step_s / self._growth(worker.snapshot.num_running)


@dataclass(frozen=True, slots=True)
class _DecodeSide:
    worker: WorkerView
    lacks_room: bool
    local_reason: str | None  # why it must prefill by itself; None when that is open
    missing_blocks: int  # to be transferred when another worker prefills
    decode_s: float


@dataclass(frozen=True, slots=True)
class _PrefillSide:
    worker: WorkerView
    lacks_room: bool
    queue_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class _Option:
    decode: str
    prefill: str | None
    rank: tuple[bool, bool, float, int]  # decode side lacks room, prefill side lacks room, seconds, blocks to move
    queue_s: float
    prefill_s: float
    note: str

    def route(self) -> Route:
        reason = f"queue {self.queue_s:.3f} s, prefill {self.prefill_s:.3f} s; {self.note}"
        return Route(self.decode, self.prefill, reason)


def _prefilled_locally(request: RoutingRequest, decode: _DecodeSide, tokens_per_s: float) -> _Option:
    """On the decode worker. Each request there waits while it computes, and that counts in full; so does one that is
    yet to come, which keeps an idle decode worker from prefilling what a prefill worker can take."""
    queue_s = backlog_tokens(decode.worker) / tokens_per_s
    prefill_s = uncached_tokens(request, decode.worker) / tokens_per_s
    harm_s = prefill_s * (num_requests(decode.worker) + 1)
    return _Option(
        decode=decode.worker.worker_id,
        prefill=None,
        rank=(decode.lacks_room, False, queue_s + prefill_s + harm_s + decode.decode_s, 0),
        queue_s=queue_s,
        prefill_s=prefill_s,
        note=decode.local_reason or "sooner than elsewhere",
    )


def _prefilled_elsewhere(view: ClusterView, decode: _DecodeSide, prefill: _PrefillSide) -> _Option:
    """Blocks are pulled while later ones are computed, so only what outlasts the prefill is waited for: at least one
    block, which is complete only at its end."""
    block_s = view.block_bytes / view.transfer_bytes_per_s
    transfer_s = max(decode.missing_blocks * block_s - prefill.prefill_s, min(decode.missing_blocks, 1) * block_s)
    cost_s = prefill.queue_s + prefill.prefill_s + transfer_s + decode.decode_s
    return _Option(
        decode=decode.worker.worker_id,
        prefill=prefill.worker.worker_id,
        rank=(decode.lacks_room, prefill.lacks_room, cost_s, decode.missing_blocks),
        queue_s=prefill.queue_s,
        prefill_s=prefill.prefill_s,
        note="predicted; transfer overlaps",
    )


def _mean_of_measured(values: Iterable[float], default: float) -> float:
    measured = [value for value in values if value > 0]
    return fmean(measured) if measured else default
