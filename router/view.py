"""What a routing decision sees, and what it says: plain data, so that policies are pure functions of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from eagleray.core.snapshot import WorkerSnapshot


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker that may be chosen, as this ingress sees it now."""

    snapshot: WorkerSnapshot
    cached_tokens: int = 0  # of this request's prefix, by the index: a hint, wrong only in time
    pending_requests: int = 0  # sent by this ingress since the snapshot was taken
    pending_tokens: int = 0  # that it has to compute for them
    pending_held_tokens: int = 0  # that it needs blocks for, computed there or elsewhere

    @property
    def worker_id(self) -> str:
        return self.snapshot.worker_id


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What matters of a request for its way."""

    num_tokens: int  # known tokens: prompt, and output so far when it is routed again
    max_new_tokens: int
    block_size_tokens: int
    sequence: int  # counts the requests of this ingress; what round-robin goes by
    reads_cache: bool = True  # prompt logprobs need every position computed


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Workers that are connected and not excluded for this request; ids in a stable order."""

    prefill: Mapping[str, WorkerView]
    decode: Mapping[str, WorkerView]
    block_bytes: int
    local_prefill_tokens: int  # an uncached suffix up to this long is prefilled on the decode worker
    transfer_bytes_per_s: float  # mean of what decode workers measured; a default until they have


@dataclass(frozen=True, slots=True)
class Route:
    """``prefill`` None: the decode worker does both."""

    decode: str
    prefill: str | None
    reason: str


class RoutingPolicy(Protocol):
    """Chooses workers. Pure: the same view gives the same route."""

    def choose(self, request: RoutingRequest, view: ClusterView) -> Route | None:
        """None when no decode worker is in the view."""
        ...
