"""The Serve deployments: what runs in a replica. Everything they compose is plain Python that needs no Ray.

This file is imported by the driver and in every replica, so nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from eagleray.api.app import create_app
from eagleray.api.context import ApiSettings
from eagleray.cluster.exporters import build_tracer
from eagleray.cluster.http_server import HttpServer
from eagleray.cluster.progress import PROCESS_PHASE, ProgressReporter
from eagleray.cluster.ray_adapter import replica_metadata
from eagleray.core.clock import Clock, SystemClock, unix_time_s
from eagleray.core.config import Config
from eagleray.core.snapshot import Role
from eagleray.core.start_phases import StartPhases
from eagleray.router.coordinator import Coordinator
from eagleray.router.metrics import IngressMetrics
from eagleray.router.policies.registry import make_policy
from eagleray.router.prefix_index.factory import INDEX_NAMESPACE, build_index
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.tokenizer import Tokenizer
from eagleray.workers.pool import ConnectedWorkers

if TYPE_CHECKING:  # in the process of a worker only
    from eagleray.cluster.worker_process import WorkerProcess
    from eagleray.workers.worker import Worker

DISCOVERY_INTERVAL_S: Final = 0.1

logger = logging.getLogger("eagleray")


class WorkerReplica:
    """One worker of either pool. Serve sees its life; tokens, KV and control go over the worker's own connections."""

    def __init__(self, role: str, config: dict[str, Any], progress_address: str | None = None) -> None:
        self._config = Config.model_validate(config)
        self._role = Role(role)
        self._stopped = threading.Event()
        worker_id = serve.get_replica_context().replica_id.unique_id
        clock = SystemClock()
        progress = ProgressReporter(progress_address, f"{role} {worker_id}", clock)
        phases = StartPhases(clock, lambda phase, duration_s: self._phase_ended(progress, phase, duration_s))
        progress.phase_ended(PROCESS_PHASE, 0.0)
        self._process = self._build(worker_id, clock, progress, phases)
        self._worker.start()
        phases.end("channel")
        progress.close()
        logger.info("%s ready in %.1f s at %s", worker_id, phases.total_s, self._worker.address)

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
            pool = self._config.prefill if self._role is Role.PREFILL else self._config.decode
            await asyncio.to_thread(self._process.stop, pool.drain_deadline_s)

    @property
    def _worker(self) -> Worker:
        return self._process.worker

    def _build(self, worker_id: str, clock: Clock, progress: ProgressReporter, phases: StartPhases) -> WorkerProcess:
        from eagleray.cluster.worker_process import WorkerPlace, build_worker_process  # torch: seconds

        phases.end("import")
        place = WorkerPlace(
            role=self._role,
            worker_id=worker_id,
            epoch=time.time_ns() // 1_000_000,
            host=ray.util.get_node_ip_address(),
        )
        return build_worker_process(self._config, place, clock, progress, phases)

    def _phase_ended(self, progress: ProgressReporter, phase: str, duration_s: float) -> None:
        progress.phase_ended(phase, duration_s)
        logger.info("start, %s: %.2f s", phase, duration_s)


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
