"""What runs in the process of a worker: everything is composed here. Imported there only, because it takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from eagleray.cluster.background import BackgroundLoop
from eagleray.cluster.progress import ProgressReporter
from eagleray.core.clock import Clock
from eagleray.core.config import Config, PoolConfig
from eagleray.core.request import RequestSpec
from eagleray.core.snapshot import Role
from eagleray.core.start_phases import StartPhases
from eagleray.decode_workers.worker import build_decode_worker
from eagleray.engine.execution.core_turns import CoreTurns, OwnCores, SharedCores
from eagleray.engine.execution.executor import build_executor
from eagleray.engine.execution.library_pages import give_back_library_pages
from eagleray.engine.speculation.build import build_draft_policy
from eagleray.kv_transfer.transports.select import make_transports
from eagleray.prefill_workers.worker import build_prefill_worker
from eagleray.router.prefix_index.factory import INDEX_NAMESPACE, build_index
from eagleray.router.prefix_index.publisher import IndexPublisher
from eagleray.text.output import OutputText
from eagleray.text.tokenizer import Tokenizer
from eagleray.workers.block_ops import select_block_ops
from eagleray.workers.build import ExecutorFactory, WorkerParts
from eagleray.workers.worker import Worker

_TURN_SHARE: Final = 0.25  # of engine.step_deadline_s: so long a step waits for its turn, and has time to compute then


@dataclass(frozen=True, kw_only=True)
class WorkerPlace:
    """Who this worker is, and where."""

    role: Role
    worker_id: str
    epoch: int  # a new one for each incarnation
    host: str
    turns_folder: Path | None  # where it takes turns with the other workers of its machine; None: it does not


@dataclass(frozen=True)
class WorkerProcess:
    """A worker and what goes on beside it; not started yet."""

    worker: Worker
    publishing: BackgroundLoop | None
    turns: CoreTurns

    def stop(self, drain_deadline_s: float) -> None:
        """Requests that are here finish first, for so long."""
        self.worker.drain(drain_deadline_s)
        if self.publishing is not None:
            self.publishing.stop()
        self.worker.stop()
        self.turns.close()


def build_worker_process(
    config: Config,
    place: WorkerPlace,
    clock: Clock,
    progress: ProgressReporter,
    phases: StartPhases,
    new_executor: ExecutorFactory | None,  # None: one that loads the model
) -> WorkerProcess:
    """Raises ``ConfigError`` for a checkpoint that cannot be served, or memory that does not suffice."""
    pool = config.prefill if place.role is Role.PREFILL else config.decode
    tokenizer = Tokenizer.from_folder(config.model.folder)
    phases.end("tokenizer")
    turns = _turns_of(place, pool)
    executor = (new_executor or build_executor)(
        config.model,
        pool.engine,
        num_threads=pool.num_threads,
        shared_kv="shared_memory" in config.transfer.transports,
        progress=progress.tensors_loaded,
        end_phase=phases.end,
        speculation=config.speculation,
        turns=turns,
    )
    progress.kernels_chosen(executor.computes_with)
    give_back_library_pages()  # most were touched by importing only

    def new_text_stream(spec: RequestSpec) -> OutputText:
        return OutputText(tokenizer, spec.sampling, spec.token_ids[: spec.num_prompt_tokens])

    block_ops = select_block_ops(pool.engine.kernels, executor.layout)
    draft_policy = build_draft_policy(config.speculation, executor.has_draft_network)
    publisher, publishing = _start_publisher(config, place, clock)
    parts = WorkerParts(
        worker_id=place.worker_id,
        epoch=place.epoch,
        executor=executor,
        engine=pool.engine,
        transfer=config.transfer,
        new_text_stream=new_text_stream,
        clock=clock,
        host=place.host,
        draft_policy=draft_policy,
        block_ops=block_ops,
        cache_listener=publisher,
    )
    if place.role is Role.PREFILL:
        return WorkerProcess(build_prefill_worker(parts), publishing, turns)
    transports = make_transports(config.transfer.transports, {place.worker_id: executor.kv}, block_ops)
    return WorkerProcess(build_decode_worker(parts, transports), publishing, turns)


def _turns_of(place: WorkerPlace, pool: PoolConfig) -> CoreTurns:
    if place.turns_folder is None:
        return OwnCores()
    return SharedCores(place.turns_folder, pool.engine.step_deadline_s * _TURN_SHARE)


def _start_publisher(
    config: Config, place: WorkerPlace, clock: Clock
) -> tuple[IndexPublisher, BackgroundLoop] | tuple[None, None]:
    """None without a server: then every ingress keeps an index, and hears of the cache over the direct channel."""
    index_config = config.index
    if index_config.backend == "memory":
        return None, None
    index = build_index(index_config, INDEX_NAMESPACE, clock)
    publisher = IndexPublisher(
        index,
        place.worker_id,
        place.epoch,
        clock,
        lease_s=index_config.lease_s,
        refresh_s=index_config.entry_ttl_s / 2,
    )
    return publisher, BackgroundLoop("index-publisher", publisher.run, index.aclose)
