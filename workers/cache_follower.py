"""Files what workers say of their caches on their connections: a prefix index in the ingress's own memory."""

from __future__ import annotations

import math

from eagleray.core.clock import Clock
from eagleray.core.messages import CacheChanges
from eagleray.router.prefix_index.memory import MemoryPrefixIndex
from eagleray.router.worker_client import WorkerClient


class CacheFollower:
    """A worker is a member of ``index`` from its first words until the connection that they came on ends."""

    def __init__(self, clock: Clock) -> None:
        self.index = MemoryPrefixIndex(clock, lease_s=math.inf)  # the connection is the lease
        self._told_by: dict[str, WorkerClient] = {}  # worker id -> the newest of its connections

    async def heard(self, client: WorkerClient, changes: CacheChanges) -> None:
        worker_id, epoch = client.welcome.worker_id, client.welcome.epoch
        if changes.is_whole:
            await self.index.leave(worker_id)
            await self.index.join(worker_id, epoch)
            self._told_by[worker_id] = client
        if self._told_by.get(worker_id) is client:
            await self.index.update(worker_id, changes.stored, changes.evicted)

    async def lost(self, client: WorkerClient) -> None:
        """The connection has ended. Another one of the same worker may have taken its place."""
        worker_id = client.welcome.worker_id
        if self._told_by.get(worker_id) is client:
            del self._told_by[worker_id]
            await self.index.leave(worker_id)
