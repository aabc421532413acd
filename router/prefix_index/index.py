"""The prefix index: which workers hold which KV blocks, asked once per request for all workers at once.

What it says is a hint. A wrong answer costs a cache miss, never a wrong token, and no answer means routing by load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

from eagleray.core.block_hash import BlockHash, CachedBlock

IndexState = Literal["up", "down", "half_open"]


class Membership(Enum):
    """What joining came to."""

    NEW = "new"  # the index knows no block of this epoch: publish all that is held
    RENEWED = "renewed"  # what was published of this epoch is still there
    NOT_JOINED = "not_joined"  # the backend is away, or a later epoch of this worker has joined


@dataclass(frozen=True, slots=True)
class IndexStatus:
    """How the index is doing, for metrics and the live page."""

    backend: str
    state: IndexState
    state_since_s: float  # on the index's own clock
    lookups: int = 0
    failed_lookups: int = 0  # asked, and no answer in time
    skipped_lookups: int = 0  # not asked, because the backend was known to be away
    last_error: str | None = None


class PrefixIndex(Protocol):
    """No method raises for a missing, slow or broken backend. One instance belongs to one event loop."""

    async def lookup(self, hashes: Sequence[BlockHash]) -> Mapping[str, int]:
        """worker id -> how many leading blocks of ``hashes`` it holds (at least 1); empty when nothing is known."""
        ...

    async def join(self, worker_id: str, epoch: int) -> Membership:
        """Become visible for one lease, or renew it. A later epoch of a worker drops what earlier ones published."""
        ...

    async def update(self, worker_id: str, stored: Sequence[CachedBlock], evicted: Sequence[CachedBlock]) -> bool:
        """Publish changes of the epoch that this instance let join last; a block in both counts as stored.

        False: not written, or not all of it. Join again, then repeat (writing twice does no harm).
        """
        ...

    async def leave(self, worker_id: str) -> None:
        """Forget the worker and all it published through this instance."""
        ...

    def status(self) -> IndexStatus: ...
