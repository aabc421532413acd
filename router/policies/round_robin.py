"""Each request to the next worker: the baseline."""

from __future__ import annotations

from eagleray.router.policies.rules import least, route_pair
from eagleray.router.view import ClusterView, Route, RoutingRequest


class RoundRobin:
    """Looks at nothing but the request's number; workers without room are not passed over."""

    def choose(self, request: RoutingRequest, view: ClusterView) -> Route | None:
        first = least(lambda worker: 0)
        return route_pair(request, view, first, first, "round robin")
