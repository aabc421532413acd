"""The Serve deployments: what runs in a replica. Everything they compose is plain Python that needs no Ray."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import ray
import uvicorn
from ray import serve
from ray.serve.handle import DeploymentHandle

from eagleray.api.app import create_app
from eagleray.api.context import ApiSettings
from eagleray.cluster.exporters import build_tracer
from eagleray.cluster.progress import reporter
from eagleray.cluster.ray_adapter import replica_metadata
from eagleray.core.clock import SystemClock, unix_time_s
from eagleray.core.config import Config, PoolConfig
from eagleray.core.request import RequestSpec
from eagleray.core.snapshot import Role
from eagleray.decode_workers.worker import build_decode_worker
from eagleray.engine.execution.executor import build_executor
from eagleray.kv_transfer.transports.select import make_transports
from eagleray.prefill_workers.worker import build_prefill_worker
from eagleray.router.coordinator import Coordinator
from eagleray.router.metrics import IngressMetrics
from eagleray.router.policies.registry import make_policy
from eagleray.router.prefix_index.factory import build_index
from eagleray.router.prefix_index.publisher import IndexPublisher
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.output import OutputText
from eagleray.text.tokenizer import Tokenizer
from eagleray.workers.build import WorkerParts
from eagleray.workers.pool import ConnectedWorkers
from eagleray.workers.worker import Worker

DISCOVERY_INTERVAL_S: Final = 0.1
INDEX_NAMESPACE: Final = "eagleray"

logger = logging.getLogger("eagleray")


class WorkerReplica:
    """One worker of either pool. Serve sees its life; tokens, KV and control go over the worker's own connections."""

    def __init__(self, role: str, config: dict[str, Any], board: Any | None = None) -> None:
        self._config = Config.model_validate(config)
        self._role = Role(role)
        self._stopped = threading.Event()
        self._publisher = _BackgroundLoop("index-publisher")
        started_s = time.monotonic()
        self._worker = self._build(self._publisher, board)
        self._worker.start()
        logger.info(
            "%s ready in %.1f s at %s", self._worker.worker_id, time.monotonic() - started_s, self._worker.address
        )

    async def record_replica_metadata(self) -> dict[str, str]:
        """Tells every ingress where to connect. Asked for once by Serve, when the replica is ready."""
        return {"address": self._worker.address, "role": self._role.value}

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if not self._worker.is_healthy:
            raise RuntimeError(f"{self._worker.worker_id} has stopped computing: {self._worker.failure!r}")

    async def hold(self, request_id: str, target: str | None = None) -> None:
        """Lasts as long as the worker serves the request, so that Serve sees the work when it scales and drains."""
        while self._worker.serves(request_id):
            await asyncio.sleep(DISCOVERY_INTERVAL_S)

    async def __del__(self) -> None:
        """Serve waits for this when it stops a replica: requests that are here finish first."""
        if not self._stopped.is_set():
            self._stopped.set()
            await asyncio.to_thread(self._worker.drain, self._pool.drain_deadline_s)
            self._publisher.stop()
            await asyncio.to_thread(self._worker.stop)

    @property
    def _pool(self) -> PoolConfig:
        return self._config.prefill if self._role is Role.PREFILL else self._config.decode

    def _build(self, publisher_loop: _BackgroundLoop, board: Any | None) -> Worker:
        config, pool, clock = self._config, self._pool, SystemClock()
        worker_id = serve.get_replica_context().replica_id.unique_id
        tokenizer = Tokenizer.from_folder(config.model.folder)
        executor = build_executor(
            config.model,
            pool.engine,
            num_threads=pool.num_threads,
            shared_kv="shared_memory" in config.transfer.transports,
            progress=reporter(board, f"{self._role.value} {worker_id}"),
        )

        def new_text_stream(spec: RequestSpec) -> OutputText:
            return OutputText(tokenizer, spec.sampling, spec.token_ids[: spec.num_prompt_tokens])

        epoch = time.time_ns() // 1_000_000
        publisher = IndexPublisher(
            build_index(config.index, INDEX_NAMESPACE, clock),
            worker_id,
            epoch,
            clock,
            lease_s=config.index.lease_s,
            refresh_s=config.index.entry_ttl_s / 2,
        )
        publisher_loop.run(publisher.run)
        parts = WorkerParts(
            worker_id=worker_id,
            epoch=epoch,
            executor=executor,
            engine=pool.engine,
            transfer=config.transfer,
            new_text_stream=new_text_stream,
            clock=clock,
            host=ray.util.get_node_ip_address(),
            cache_listener=publisher,
        )
        if self._role is Role.PREFILL:
            return build_prefill_worker(parts)
        return build_decode_worker(parts, make_transports(config.transfer.transports, {worker_id: executor.kv}))


class IngressReplica:
    """The HTTP front and the router. Listens itself: a stream of tokens makes no hop through a Serve proxy, and a
    client that hangs up is noticed at once. Several ingresses of one host share the port (SO_REUSEPORT)."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: dict[str, Any], decode: DeploymentHandle[Any], prefill: DeploymentHandle[Any] | None
    ) -> None:
        self._config = Config.model_validate(config)
        self._handles = {Role.DECODE: decode} if prefill is None else {Role.DECODE: decode, Role.PREFILL: prefill}
        clock, model = SystemClock(), self._config.model
        ingress_id = serve.get_replica_context().replica_id.unique_id
        self._pool = ConnectedWorkers(ingress_id, self._config.router)
        self._tracer = build_tracer(self._config.telemetry, model.name)
        coordinator = Coordinator(
            self._pool,
            make_policy(self._config.router.policy),
            build_index(self._config.index, INDEX_NAMESPACE, clock),
            self._config.router,
            clock,
            IngressMetrics(model.name),
            self._tracer,
            on_placed=self._hold,
        )
        tokenizer = Tokenizer.from_folder(model.folder)
        app = create_app(
            coordinator,
            tokenizer,
            ChatTemplate.from_folder(model.folder, tokenizer),
            ApiSettings(model.name, self._config.http.max_body_bytes, unix_time_s(), self._config.http.api_key),
        )
        self._server = HttpServer(app, self._config.http.host, self._config.http.port)
        self._tasks = [asyncio.create_task(self._discover()), asyncio.create_task(self._server.serve())]

    async def address(self) -> str:
        """http://host:port that it listens on."""
        return self._server.address

    def check_health(self) -> None:
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"the ingress has stopped: {task.exception()!r}")

    async def __del__(self) -> None:
        self._server.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._pool.aclose()
        await asyncio.to_thread(self._tracer.close)

    def _hold(self, worker_id: str, request_id: str) -> None:
        """A call that lasts as long as the request does there. Beside the request's way: nobody waits for it."""
        client = self._pool.workers().get(worker_id)
        if client is not None:  # else it was lost in this very moment
            self._handles[client.welcome.role].hold.remote(request_id, target=worker_id)

    async def _discover(self) -> None:
        """Follow the replicas that Serve says are running."""
        while True:
            metadata = [entry for handle in self._handles.values() for entry in replica_metadata(handle)]
            self._pool.set_addresses({entry["address"] for entry in metadata if "address" in entry})
            await asyncio.sleep(DISCOVERY_INTERVAL_S)


class HttpServer:
    """uvicorn on a socket of our own."""

    def __init__(self, app: Any, host: str, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind((host, port))
        config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)

    async def serve(self) -> None:
        await self._server.serve([self._socket])

    @property
    def address(self) -> str:
        host, port = self._socket.getsockname()[:2]
        return f"http://{host}:{port}"

    def stop(self) -> None:
        self._server.should_exit = True


class _BackgroundLoop:
    """One coroutine on an event loop of its own thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._future: Any = None

    def run(self, coroutine: Callable[[], Any]) -> None:
        self._thread.start()
        self._future = asyncio.run_coroutine_threadsafe(coroutine(), self._loop)

    def stop(self) -> None:
        if self._future is not None:
            self._loop.call_soon_threadsafe(self._future.cancel)
