"""What runs in the process of an ingress: the HTTP front and the router. Imported there only."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from ray.serve.handle import DeploymentHandle

from eagleray.api.app import create_app
from eagleray.api.context import ApiSettings
from eagleray.cluster.exporters import build_tracer
from eagleray.cluster.http_server import HttpServer
from eagleray.cluster.ray_adapter import replica_metadata
from eagleray.core.clock import SystemClock, unix_time_s
from eagleray.core.config import Config
from eagleray.core.snapshot import Role
from eagleray.router.coordinator import Coordinator
from eagleray.router.metrics import IngressMetrics
from eagleray.router.policies.registry import make_policy
from eagleray.router.prefix_index.factory import INDEX_NAMESPACE, build_index
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.tokenizer import Tokenizer
from eagleray.workers.pool import ConnectedWorkers

DISCOVERY_INTERVAL_S: Final = 0.5
# A call of Serve's costs more than all else that a short request does: only what lasts is worth telling.
HOLD_AFTER_S: Final = 0.5


class IngressProcess:
    """Listens itself: a stream of tokens makes no hop through a Serve proxy, and a client that hangs up is noticed at
    once. Several ingresses of one host share the port (SO_REUSEPORT). Lives on the event loop that it is made on."""

    def __init__(self, config: Config, ingress_id: str, handles: Mapping[Role, DeploymentHandle[Any]]) -> None:
        self._config, self._handles = config, handles
        clock, model = SystemClock(), config.model
        self._pool = ConnectedWorkers(ingress_id, self._config.router, clock)
        in_memory = self._config.index.backend == "memory"
        self._index = self._pool.caches.index if in_memory else build_index(self._config.index, INDEX_NAMESPACE, clock)
        self._tracer = build_tracer(self._config.telemetry, model.name)
        coordinator = Coordinator(
            self._pool,
            make_policy(self._config.router.policy),
            self._index,
            self._config.router,
            clock,
            IngressMetrics(model.name),
            self._tracer,
            on_placed=self._hold_later,
        )
        tokenizer = Tokenizer.from_folder(model.folder)
        app = create_app(
            coordinator,
            tokenizer,
            ChatTemplate.from_folder(model.folder, tokenizer),
            ApiSettings(model.name, self._config.http.max_body_bytes, unix_time_s(), self._config.http.api_key),
            clock,
        )
        self._server = HttpServer(app, self._config.http.host, self._config.http.port)
        self._discovering = asyncio.create_task(self._discover())
        self._serving = self._server.start()

    @property
    def address(self) -> str:
        """http://host:port that it listens on."""
        return self._server.address

    def check_health(self) -> None:
        """Raises ``RuntimeError`` when it can serve no more."""
        for task in (self._discovering, self._serving):
            if task.done():
                raise RuntimeError(f"the ingress has stopped: {task.exception()!r}")

    async def aclose(self) -> None:
        """Answers under way end first, and need the workers until then."""
        await self._server.aclose()
        self._discovering.cancel()
        await asyncio.gather(self._discovering, return_exceptions=True)
        await self._pool.aclose()
        await self._index.aclose()
        await asyncio.to_thread(self._tracer.close)

    def _hold_later(self, worker_id: str, request_id: str) -> None:
        """Beside the request's way, and not while its first token is."""
        asyncio.get_running_loop().call_later(HOLD_AFTER_S, self._hold, worker_id, request_id)

    def _hold(self, worker_id: str, request_id: str) -> None:
        """A call that lasts as long as the request does there. Nobody waits for it."""
        client = self._pool.workers().get(worker_id)
        if client is not None and client.serves(request_id):
            self._handles[client.welcome.role].hold.remote(request_id, target=worker_id)

    async def _discover(self) -> None:
        """Follow the replicas that Serve says are running."""
        while True:
            metadata = [entry for handle in self._handles.values() for entry in replica_metadata(handle)]
            self._pool.set_addresses({entry["address"] for entry in metadata if "address" in entry})
            await asyncio.sleep(DISCOVERY_INTERVAL_S)
