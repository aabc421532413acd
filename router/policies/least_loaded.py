"""Each request to the worker with the least to do."""

from __future__ import annotations

from eagleray.router.policies.rules import (
    backlog_tokens,
    lacks_room_to_decode,
    lacks_room_to_prefill,
    least,
    num_requests,
    route_pair,
)
from eagleray.router.view import ClusterView, Route, RoutingRequest, WorkerView


class LeastLoaded:
    """Decode: room first, then fewest requests, then the shortest prefill backlog. Prefill: room, backlog, requests."""

    def choose(self, request: RoutingRequest, view: ClusterView) -> Route | None:
        def decode_load(worker: WorkerView) -> tuple[bool, int, int]:
            return lacks_room_to_decode(request, worker), num_requests(worker), backlog_tokens(worker)

        def prefill_load(worker: WorkerView) -> tuple[bool, int, int]:
            return lacks_room_to_prefill(request, worker), backlog_tokens(worker), num_requests(worker)

        return route_pair(request, view, least(decode_load), least(prefill_load), "least loaded")
