"""The Serve deployments: what runs in a replica. Everything they compose is plain Python that needs no Ray."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import Any, Final

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from eagleray.api.app import create_app
from eagleray.api.context import ApiSettings
from eagleray.cluster.background import BackgroundLoop
from eagleray.cluster.exporters import build_tracer
from eagleray.cluster.http_server import HttpServer
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
from eagleray.workers.block_ops import select_block_ops
from eagleray.workers.build import ExecutorFactory, WorkerParts
from eagleray.workers.pool import ConnectedWorkers
from eagleray.workers.worker import Worker

DISCOVERY_INTERVAL_S: Final = 0.1
# A call of Serve's costs more than all else that a short request does: only what lasts is worth telling.
HOLD_AFTER_S: Final = 0.5
HOLD_INTERVAL_S: Final = 0.5
INDEX_NAMESPACE: Final = "eagleray"

logger = logging.getLogger("eagleray")


class WorkerReplica:
    """One worker of either pool. Serve sees its life; tokens, KV and control go over the worker's own connections."""

    def __init__(
        self,
        role: str,
        config: dict[str, Any],
        board: Any | None = None,
        new_executor: ExecutorFactory = build_executor,
    ) -> None:
        self._config = Config.model_validate(config)
        self._role = Role(role)
        self._new_executor = new_executor
        self._stopped = threading.Event()
        self._publishing: BackgroundLoop | None = None
        started_s = time.monotonic()
        self._worker = self._build(board)
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
            await asyncio.sleep(HOLD_INTERVAL_S)

    async def __del__(self) -> None:
        """Serve waits for this when it stops a replica: requests that are here finish first."""
        if not self._stopped.is_set():
            self._stopped.set()
            await asyncio.to_thread(self._worker.drain, self._pool.drain_deadline_s)
            if self._publishing is not None:
                await asyncio.to_thread(self._publishing.stop)
            await asyncio.to_thread(self._worker.stop)

    @property
    def _pool(self) -> PoolConfig:
        return self._config.prefill if self._role is Role.PREFILL else self._config.decode

    def _build(self, board: Any | None) -> Worker:
        config, pool, clock = self._config, self._pool, SystemClock()
        worker_id = serve.get_replica_context().replica_id.unique_id
        tokenizer = Tokenizer.from_folder(config.model.folder)
        executor = self._new_executor(
            config.model,
            pool.engine,
            num_threads=pool.num_threads,
            shared_kv="shared_memory" in config.transfer.transports,
            progress=reporter(board, f"{self._role.value} {worker_id}"),
        )

        def new_text_stream(spec: RequestSpec) -> OutputText:
            return OutputText(tokenizer, spec.sampling, spec.token_ids[: spec.num_prompt_tokens])

        block_ops = select_block_ops(pool.engine.kernels, executor.layout)
        epoch = time.time_ns() // 1_000_000
        parts = WorkerParts(
            worker_id=worker_id,
            epoch=epoch,
            executor=executor,
            engine=pool.engine,
            transfer=config.transfer,
            new_text_stream=new_text_stream,
            clock=clock,
            host=ray.util.get_node_ip_address(),
            block_ops=block_ops,
            cache_listener=self._start_publisher(worker_id, epoch),
        )
        if self._role is Role.PREFILL:
            return build_prefill_worker(parts)
        transports = make_transports(config.transfer.transports, {worker_id: executor.kv}, block_ops)
        return build_decode_worker(parts, transports)

    def _start_publisher(self, worker_id: str, epoch: int) -> IndexPublisher | None:
        """None without a server: then every ingress keeps an index, and hears of the cache over the direct channel."""
        config, clock = self._config.index, SystemClock()
        if config.backend == "memory":
            return None
        index = build_index(config, INDEX_NAMESPACE, clock)
        publisher = IndexPublisher(
            index, worker_id, epoch, clock, lease_s=config.lease_s, refresh_s=config.entry_ttl_s / 2
        )
        self._publishing = BackgroundLoop("index-publisher", publisher.run, index.aclose)
        return publisher


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
        )
        self._server = HttpServer(app, self._config.http.host, self._config.http.port)
        self._discovering = asyncio.create_task(self._discover())
        self._serving = self._server.start()

    async def address(self) -> str:
        """http://host:port that it listens on."""
        return self._server.address

    def check_health(self) -> None:
        for task in (self._discovering, self._serving):
            if task.done():
                raise RuntimeError(f"the ingress has stopped: {task.exception()!r}")

    async def __del__(self) -> None:
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
