"""Each request to the worker that holds the most of its prefix, unless that worker is overloaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from eagleray.router.policies.rules import (
    backlog_tokens,
    lacks_room_to_decode,
    lacks_room_to_prefill,
    num_requests,
    route_pair,
)
from eagleray.router.view import ClusterView, Route, RoutingRequest, WorkerView


@dataclass(frozen=True)
class PrefixAware:
    """Among the workers with room that are not overloaded, the longest cached prefix; then the least load.

    Overloaded: more load than ``overload_factor`` times the least loaded worker's plus a slack. Load is backlog tokens
    for prefill and requests for decode. A prefix counts only from ``min_share`` of the request on: else all requests
    with one system prompt would follow the first of them.
    """

    overload_factor: float = 1.5
    slack_tokens: int = 16384  # a prompt or two: less gives up too many hits, by a replay of recorded chats
    slack_requests: int = 4
    min_share: float = 0.1

    def choose(self, request: RoutingRequest, view: ClusterView) -> Route | None:
        def choose_decode(workers: Iterable[WorkerView]) -> WorkerView:
            candidates = [_Candidate(w, lacks_room_to_decode(request, w), num_requests(w)) for w in workers]
            return self._best(request, candidates, self.slack_requests)

        def choose_prefill(workers: Iterable[WorkerView]) -> WorkerView:
            candidates = [_Candidate(w, lacks_room_to_prefill(request, w), backlog_tokens(w)) for w in workers]
            return self._best(request, candidates, self.slack_tokens)

        return route_pair(request, view, choose_decode, choose_prefill, "longest cached prefix within the load limit")

    def _best(self, request: RoutingRequest, candidates: list[_Candidate], slack: int) -> WorkerView:
        with_room = [candidate for candidate in candidates if not candidate.lacks_room] or candidates
        limit = self.overload_factor * min(candidate.load for candidate in with_room) + slack
        shortest = self.min_share * request.num_tokens if request.reads_cache else float("inf")

        def rank(candidate: _Candidate) -> tuple[int, int]:
            cached = candidate.worker.cached_tokens
            return (-cached if cached >= shortest else 0, candidate.load)

        return min((c for c in with_room if c.load <= limit), key=rank).worker


@dataclass(frozen=True, slots=True)
class _Candidate:
    worker: WorkerView
    lacks_room: bool
    load: int
