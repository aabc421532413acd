"""The prefix index in process memory: for one ingress without a server, for tests and for the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eagleray.core.block_hash import BlockHash, CachedBlock
from eagleray.core.clock import Clock
from eagleray.router.prefix_index.index import IndexStatus, Membership


@dataclass(slots=True)
class _Member:
    epoch: int
    lease_until_s: float
    blocks: set[BlockHash]


class MemoryPrefixIndex:
    """A ``PrefixIndex`` that is always up."""

    def __init__(self, clock: Clock, lease_s: float) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._members: dict[str, _Member] = {}
        self._since_s = clock.now_s()
        self._lookups = 0

    async def lookup(self, hashes: Sequence[BlockHash]) -> Mapping[str, int]:
        self._lookups += 1
        counts = {
            worker_id: _num_leading(member.blocks, hashes)
            for worker_id, member in self._members.items()
            if self._is_live(member)
        }
        return {worker_id: count for worker_id, count in counts.items() if count}

    async def join(self, worker_id: str, epoch: int) -> Membership:
        self._members = {
            name: member for name, member in self._members.items() if name == worker_id or self._is_live(member)
        }
        member = self._members.get(worker_id)
        if member is not None and member.epoch > epoch and self._is_live(member):
            return Membership.NOT_JOINED
        lease_until_s = self._clock.now_s() + self._lease_s
        if member is not None and member.epoch == epoch:
            member.lease_until_s = lease_until_s
            return Membership.RENEWED
        self._members[worker_id] = _Member(epoch, lease_until_s, set())
        return Membership.NEW

    async def update(self, worker_id: str, stored: Sequence[CachedBlock], evicted: Sequence[CachedBlock]) -> bool:
        member = self._members.get(worker_id)
        if member is None or not self._is_live(member):
            return False
        member.blocks.difference_update(block.hash for block in evicted)
        member.blocks.update(block.hash for block in stored)
        return True

    async def leave(self, worker_id: str) -> None:
        self._members.pop(worker_id, None)

    def status(self) -> IndexStatus:
        return IndexStatus(backend="memory", state="up", state_since_s=self._since_s, lookups=self._lookups)

    async def aclose(self) -> None:
        """Forget everything, as a server that restarts does."""
        self._members.clear()

    def _is_live(self, member: _Member) -> bool:
        return self._clock.now_s() < member.lease_until_s


def _num_leading(blocks: set[BlockHash], hashes: Sequence[BlockHash]) -> int:
    return next((depth for depth, block in enumerate(hashes) if block not in blocks), len(hashes))
