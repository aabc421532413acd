"""Routing policies by the names that the configuration uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from eagleray.core.errors import ConfigError
from eagleray.router.policies.least_loaded import LeastLoaded
from eagleray.router.policies.predicted_time import PredictedTime
from eagleray.router.policies.prefix_aware import PrefixAware
from eagleray.router.policies.round_robin import RoundRobin
from eagleray.router.view import RoutingPolicy

POLICIES: Final[Mapping[str, Callable[[], RoutingPolicy]]] = MappingProxyType(
    {
        "round_robin": RoundRobin,
        "least_loaded": LeastLoaded,
        "prefix_aware": PrefixAware,
        "predicted_time": PredictedTime,
    }
)


def make_policy(name: str) -> RoutingPolicy:
    """Raises ``ConfigError`` for a name that is not in ``POLICIES``."""
    if name not in POLICIES:
        raise ConfigError("router.policy", name, f"use one of {', '.join(POLICIES)}")
    return POLICIES[name]()
