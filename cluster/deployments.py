"""The Serve deployments: what runs in a replica. Everything they compose is plain Python that needs no Ray.

This file is imported by the driver and by every replica. So it imports as little as possible: what a worker or an
ingress needs, torch above all, is imported where one begins.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from eagleray.cluster.deferred_import import defer_what_only_compilers_need
from eagleray.cluster.progress import PROCESS_PHASE, ProgressReporter
from eagleray.cluster.ray_adapter import log_beside_serve
from eagleray.core.clock import Clock, SystemClock
from eagleray.core.config import Config
from eagleray.core.snapshot import Role
from eagleray.core.start_phases import StartPhases

if TYPE_CHECKING:
    from eagleray.cluster.worker_process import WorkerProcess
    from eagleray.workers.build import ExecutorFactory
    from eagleray.workers.worker import Worker

HOLD_INTERVAL_S: Final = 0.5

logger = logging.getLogger("eagleray")


class WorkerReplica:
    """One worker of either pool. Serve sees its life; tokens, KV and control go over the worker's own connections."""

    def __init__(
        self,
        role: str,
        config: dict[str, Any],
        progress_address: str | None = None,
        new_executor: ExecutorFactory | None = None,
        turns_folder: Path | None = None,
    ) -> None:
        log_beside_serve(logger)
        self._config = Config.model_validate(config)
        self._role = Role(role)
        self._new_executor, self._turns_folder = new_executor, turns_folder
        self._stopped = threading.Event()
        self._look: asyncio.Task[None] | None = None  # ends when held calls look again at what they wait for
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

    async def check_health(self) -> None:  # a plain function would wake a thread of Serve's each second
        """Serve replaces the replica when this raises."""
        if not self._worker.is_healthy:
            raise RuntimeError(f"{self._worker.worker_id} has stopped computing: {self._worker.failure!r}")

    async def hold(self, request_id: str, target: str | None = None) -> None:
        """Lasts as long as the worker serves the request, so that Serve sees the work when it scales and drains."""
        while self._worker.serves(request_id):
            await self._next_look()

    async def __del__(self) -> None:
        """Serve waits for this when it stops a replica: requests that are here finish first."""
        if not self._stopped.is_set():
            self._stopped.set()
            pool = self._config.prefill if self._role is Role.PREFILL else self._config.decode
            await asyncio.to_thread(self._process.stop, pool.drain_deadline_s)

    @property
    def _worker(self) -> Worker:
        return self._process.worker

    async def _next_look(self) -> None:
        """All that wait are woken at once: each on its own would wake the process as often as a step does."""
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(asyncio.sleep(HOLD_INTERVAL_S))
        await asyncio.wait([self._look])

    def _build(self, worker_id: str, clock: Clock, progress: ProgressReporter, phases: StartPhases) -> WorkerProcess:
        defer_what_only_compilers_need()
        from eagleray.cluster.worker_process import WorkerPlace, build_worker_process  # torch: seconds

        phases.end("import")
        place = WorkerPlace(
            role=self._role,
            worker_id=worker_id,
            epoch=time.time_ns() // 1_000_000,
            host=ray.util.get_node_ip_address(),
            turns_folder=self._turns_folder,
        )
        return build_worker_process(self._config, place, clock, progress, phases, self._new_executor)

    def _phase_ended(self, progress: ProgressReporter, phase: str, duration_s: float) -> None:
        progress.phase_ended(phase, duration_s)
        logger.info("start, %s: %.2f s", phase, duration_s)


class IngressReplica:
    """One ingress: the HTTP front and the router."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: dict[str, Any], decode: DeploymentHandle[Any], prefill: DeploymentHandle[Any] | None
    ) -> None:
        log_beside_serve(logger)
        from eagleray.cluster.ingress_process import IngressProcess  # no worker needs it

        handles = {Role.DECODE: decode} if prefill is None else {Role.DECODE: decode, Role.PREFILL: prefill}
        ingress_id = serve.get_replica_context().replica_id.unique_id
        self._process = IngressProcess(Config.model_validate(config), ingress_id, handles)

    async def address(self) -> str:
        """http://host:port that it listens on."""
        return self._process.address

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        self._process.check_health()

    async def __del__(self) -> None:
        """Answers under way end first, and need the workers until then."""
        await self._process.aclose()
