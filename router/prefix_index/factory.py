"""Builds the prefix index that the configuration names."""

from __future__ import annotations

from typing import Final

from eagleray.core.clock import Clock
from eagleray.core.config import IndexConfig
from eagleray.router.prefix_index.memory import MemoryPrefixIndex
from eagleray.router.prefix_index.redis import RedisPrefixIndex

INDEX_NAMESPACE: Final = "eagleray"  # of services


def build_index(config: IndexConfig, namespace: str, clock: Clock) -> MemoryPrefixIndex | RedisPrefixIndex:
    """Both kinds are a ``PrefixIndex``, and are closed with ``aclose()`` by whoever built them.

    ``namespace`` separates models that share a server; block hashes differ between models anyway, so it only keeps
    their workers apart. Raises ``ConfigError`` when ``redis`` is asked for without a URL.
    """
    if config.backend == "memory":
        return MemoryPrefixIndex(clock, config.lease_s)
    return RedisPrefixIndex(config, namespace, clock)
