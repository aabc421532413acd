"""The workers that an ingress is connected to, following the list of those that exist."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from eagleray.core.config import RouterConfig
from eagleray.core.errors import WorkerLost
from eagleray.workers.client import ChannelClient

RECONNECT_MIN_S: Final = 0.1
RECONNECT_MAX_S: Final = 2.0


class ConnectedWorkers:
    """A ``router.worker_client.WorkerPool`` over direct channels. Lives on one event loop."""

    def __init__(self, ingress_id: str, config: RouterConfig) -> None:
        self._ingress_id = ingress_id
        self._config = config
        self._clients: dict[str, ChannelClient] = {}  # worker id -> connection that is up
        self._members: dict[str, asyncio.Task[None]] = {}  # address -> what keeps it connected
        self._changed = asyncio.Event()

    def workers(self) -> Mapping[str, ChannelClient]:
        return {worker_id: client for worker_id, client in self._clients.items() if not client.is_lost}

    async def wait_for_change(self, deadline_s: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(deadline_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    def set_addresses(self, addresses: set[str]) -> None:
        """Connect to new ones, let go of those that are not listed any more. Returns at once."""
        for address in self._members.keys() - addresses:
            self._members.pop(address).cancel()
        for address in addresses - self._members.keys():
            self._members[address] = asyncio.create_task(self._keep_connected(address))

    async def aclose(self) -> None:
        tasks = list(self._members.values())
        self.set_addresses(set())
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_connected(self, address: str) -> None:
        """Until cancelled: a listed worker whose connection broke may only have been slow."""
        delay_s = RECONNECT_MIN_S
        while True:
            try:
                client = await ChannelClient.connect(
                    address,
                    self._ingress_id,
                    submit_deadline_s=self._config.submit_deadline_s,
                    stall_deadline_s=self._config.stall_deadline_s,
                    on_change=self._changed.set,
                )
            except WorkerLost:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RECONNECT_MAX_S)
                continue
            delay_s = RECONNECT_MIN_S
            await self._follow(client)

    async def _follow(self, client: ChannelClient) -> None:
        worker_id = client.welcome.worker_id
        self._clients[worker_id] = client
        self._changed.set()
        try:
            await client.wait_lost()
        finally:
            if self._clients.get(worker_id) is client:
                del self._clients[worker_id]
            self._changed.set()
            await client.aclose()
