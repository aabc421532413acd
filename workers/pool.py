"""The workers that an ingress is connected to, following the list of those that exist."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Final

from eagleray.core.clock import Clock
from eagleray.core.config import RouterConfig
from eagleray.core.errors import WorkerLost
from eagleray.workers.cache_follower import CacheFollower
from eagleray.workers.client import ChannelClient

RECONNECT_MIN_S: Final = 0.1
RECONNECT_MAX_S: Final = 2.0
FOLLOW_INTERVAL_S: Final = 0.5  # a connection that is not needed any more ends this much later

logger = logging.getLogger("eagleray")


class ConnectedWorkers:
    """A ``router.worker_client.WorkerPool`` over direct channels. Lives on one event loop."""

    def __init__(self, ingress_id: str, config: RouterConfig, clock: Clock) -> None:
        self._ingress_id = ingress_id
        self._config = config
        self.caches = CacheFollower(clock)
        self._clients: dict[str, ChannelClient] = {}  # address -> connection that is up, of those listed
        self._listed: dict[str, asyncio.Task[None]] = {}  # address -> what keeps it connected
        self._tasks: set[asyncio.Task[None]] = set()  # of those, and of the ones that finish what they have
        self._changed = asyncio.Event()

    def workers(self) -> Mapping[str, ChannelClient]:
        return {client.welcome.worker_id: client for client in self._clients.values() if not client.is_lost}

    async def wait_for_change(self, deadline_s: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(deadline_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    def set_addresses(self, addresses: set[str]) -> None:
        """Connect to new ones. One that is not listed any more gets no new request; its connection stays until those
        it has are done, because a worker that is being stopped finishes them. Returns at once."""
        for address in self._listed.keys() - addresses:
            task = self._listed.pop(address)
            if self._clients.pop(address, None) is None:
                task.cancel()
            self._changed.set()
        for address in addresses - self._listed.keys():
            task = self._listed[address] = asyncio.create_task(self._keep_connected(address))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """End all connections, whatever they carry."""
        tasks = list(self._tasks)
        self.set_addresses(set())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_connected(self, address: str) -> None:
        """As long as it is listed: a worker whose connection broke may only have been slow."""
        delay_s, is_reported = RECONNECT_MIN_S, False
        while self._is_listed(address):
            try:
                client = await ChannelClient.connect(
                    address,
                    self._ingress_id,
                    submit_deadline_s=self._config.submit_deadline_s,
                    stall_deadline_s=self._config.stall_deadline_s,
                    on_change=self._changed.set,
                    on_cache_changes=self.caches.heard,
                )
                delay_s = RECONNECT_MIN_S
                await self._follow(address, client)
                continue
            except WorkerLost:
                pass
            except Exception:  # a bug of ours, which must not cost us the worker for ever
                if not is_reported:
                    logger.exception("the connection to %s ended unexpectedly; it is made again", address)
                is_reported = True
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RECONNECT_MAX_S)

    async def _follow(self, address: str, client: ChannelClient) -> None:
        """Until the connection is lost, or not listed and not needed any more."""
        self._clients[address] = client
        self._changed.set()
        try:
            while not client.is_lost and (self._is_listed(address) or client.has_requests):
                await client.wait_lost(FOLLOW_INTERVAL_S)
        finally:
            if self._clients.get(address) is client:
                del self._clients[address]
            self._changed.set()
            await client.aclose()
            await self.caches.lost(client)

    def _is_listed(self, address: str) -> bool:
        """Whether it is this task that keeps the address connected: it may have been listed anew since."""
        return self._listed.get(address) is asyncio.current_task()
