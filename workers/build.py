"""What building either kind of worker has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from eagleray.core.clock import Clock
from eagleray.core.config import EngineConfig, ModelConfigSection, SpeculationConfig, TransferConfig
from eagleray.core.kv_layout import KVLayout
from eagleray.core.kv_region import KVRegion, SharedMemoryRef
from eagleray.core.snapshot import Role
from eagleray.engine.engine import Engine, EngineExecutor
from eagleray.engine.execution.core_turns import CoreTurns
from eagleray.engine.outputs import TextStreamFactory
from eagleray.engine.scheduling.plan import StepHandle, StepPlan
from eagleray.engine.speculation.controller import DraftPolicy
from eagleray.kv_transfer.fingerprint import PORTABLE_BLOCK_OPS, BlockOps
from eagleray.kv_transfer.transport import BlockStore
from eagleray.workers.hand_over import HandOver, Schedule
from eagleray.workers.worker import CacheListener, Worker


class WorkerKV(BlockStore, Protocol):
    """A worker's KV pool, as far as others read it."""

    @property
    def group_offsets(self) -> Sequence[int]: ...

    def shared_memory_ref(self) -> SharedMemoryRef | None: ...


class WorkerExecutor(EngineExecutor, Protocol):
    layout: KVLayout
    has_draft_network: bool  # it guesses with KV of its own
    computes_with: str  # which kernels, and if these are not the best there are, why: for people

    @property
    def kv(self) -> WorkerKV: ...

    def submit(self, plan: StepPlan) -> StepHandle: ...


class ExecutorFactory(Protocol):
    """Makes the executor of one worker, in the worker's process (``engine.execution.executor.build_executor``)."""

    def __call__(
        self,
        model: ModelConfigSection,
        engine: EngineConfig,
        *,
        num_threads: int | None,
        shared_kv: bool,
        progress: Callable[[int, int], None] | None,
        end_phase: Callable[[str], None],
        speculation: SpeculationConfig | None,
        turns: CoreTurns,
    ) -> WorkerExecutor: ...


@dataclass(frozen=True, kw_only=True)
class WorkerParts:
    """What a worker is made of, whatever its role."""

    worker_id: str
    epoch: int  # a new one for each incarnation
    executor: WorkerExecutor
    engine: EngineConfig
    transfer: TransferConfig
    new_text_stream: TextStreamFactory
    clock: Clock
    host: str = "127.0.0.1"
    draft_policy: DraftPolicy | None = None  # of a worker that decodes; none: it does not guess
    block_ops: BlockOps = PORTABLE_BLOCK_OPS
    cache_listener: CacheListener | None = None  # none: ingresses hear of the cache on their connections

    def region(self) -> KVRegion:
        """The worker's pool as told to others, before it has an address."""
        executor = self.executor
        return KVRegion(
            worker_id=self.worker_id,
            epoch=self.epoch,
            layout=executor.layout,
            num_blocks=executor.num_blocks,
            group_offsets=tuple(executor.kv.group_offsets),
            address=f"{self.host}:0",
            model_identity=executor.model_identity,
            draft_identity=executor.draft_identity,
            shared_memory=executor.kv.shared_memory_ref(),
        )

    def assemble(self, role: Role, engine: Engine, new_hand_over: Callable[[Schedule], HandOver]) -> Worker:
        """The worker, not started yet."""
        return Worker(
            self.worker_id,
            role,
            self.epoch,
            engine,
            new_hand_over,
            self.clock,
            config=self.engine,
            host=self.host,
            cache_listener=self.cache_listener,
        )
