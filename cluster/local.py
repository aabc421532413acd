"""A whole cluster in one process: real workers, channels, transfers and router, on whatever executors are given.

For tests, benchmarks of the plumbing, and trying things out without Ray. Nothing in it is faked but, if one likes, the
executors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from eagleray.core.clock import SystemClock
from eagleray.core.config import Config, PoolConfig
from eagleray.core.snapshot import Role
from eagleray.decode_workers.worker import build_decode_worker
from eagleray.engine.outputs import TextStreamFactory
from eagleray.engine.speculation.controller import DraftPolicy
from eagleray.kv_transfer.transport import BlockStore, Transport
from eagleray.kv_transfer.transports.select import make_transports
from eagleray.prefill_workers.worker import build_prefill_worker
from eagleray.router.coordinator import Coordinator
from eagleray.router.metrics import IngressMetrics
from eagleray.router.policies.registry import make_policy
from eagleray.router.tracing import NoTracer
from eagleray.workers.build import WorkerExecutor, WorkerParts
from eagleray.workers.pool import ConnectedWorkers
from eagleray.workers.worker import Worker

START_DEADLINE_S = 30.0


class LocalCluster:
    """An async context: workers are up and connected inside it, and gone after it.

    Args:
        new_executor: makes the executor of one worker of a role.
        new_text_stream: makes the text of one request (``text.output.OutputText``).
        new_draft_policy: decides how much an executor's worker guesses; None: nobody guesses.
        new_transports: makes a decode worker's transports from their names and all pools; a test injects faults here.
    """

    def __init__(
        self,
        config: Config,
        new_executor: Callable[[Role, PoolConfig], WorkerExecutor],
        new_text_stream: TextStreamFactory,
        new_transports: Callable[[Sequence[str], Mapping[str, BlockStore]], list[Transport]] = make_transports,
        new_draft_policy: Callable[[WorkerExecutor], DraftPolicy] | None = None,
    ) -> None:
        self.config = config
        self.clock = SystemClock()
        self.workers: dict[str, Worker] = {}
        self._new_executor, self._new_text_stream = new_executor, new_text_stream
        self._new_transports = new_transports
        self._new_draft_policy = new_draft_policy
        self._stores: dict[str, BlockStore] = {}
        self._pool = ConnectedWorkers("local", config.router, self.clock)
        self._num_started = 0
        self.coordinator = Coordinator(
            self._pool,
            make_policy(config.router.policy),
            self._pool.caches.index,
            config.router,
            self.clock,
            IngressMetrics(config.model.name),
            NoTracer(),
        )

    async def __aenter__(self) -> Self:
        for role, pool in ((Role.PREFILL, self.config.prefill), (Role.DECODE, self.config.decode)):
            for _ in range(pool.replicas):
                self.start_worker(role)
        await self.wait_connected()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.aclose()
        for worker_id in list(self.workers):
            await self.stop_worker(worker_id)

    def start_worker(self, role: Role) -> Worker:
        """One more worker of a role; the router finds it."""
        self._num_started += 1
        worker_id = f"{role.value}-{self._num_started}"
        pool = self.config.prefill if role is Role.PREFILL else self.config.decode
        executor = self._new_executor(role, pool)
        parts = WorkerParts(
            worker_id=worker_id,
            epoch=self._num_started,
            executor=executor,
            engine=pool.engine,
            transfer=self.config.transfer,
            new_text_stream=self._new_text_stream,
            clock=self.clock,
            draft_policy=self._new_draft_policy(executor) if self._new_draft_policy is not None else None,
        )
        self._stores[worker_id] = executor.kv
        if role is Role.PREFILL:
            worker = build_prefill_worker(parts)
        else:
            worker = build_decode_worker(parts, self._new_transports(self.config.transfer.transports, self._stores))
        worker.start()
        self.workers[worker_id] = worker
        self._pool.set_addresses({worker.address for worker in self.workers.values()})
        return worker

    async def stop_worker(self, worker_id: str) -> None:
        """Stop a worker at once, as if it had died: its connections break, its requests go on elsewhere."""
        worker = self.workers.pop(worker_id)
        self._pool.set_addresses({other.address for other in self.workers.values()})
        await asyncio.to_thread(worker.stop)
        del self._stores[worker_id]

    async def wait_connected(self) -> None:
        """Until the router is connected to every worker. Raises ``TimeoutError`` after ``START_DEADLINE_S``."""
        async with asyncio.timeout(START_DEADLINE_S):
            while self._pool.workers().keys() != self.workers.keys():
                await self._pool.wait_for_change(1.0)
