"""A prefill worker: an engine, and a source that announces KV blocks as chunks complete."""

from __future__ import annotations

from collections.abc import Callable

from eagleray.core.snapshot import Role
from eagleray.engine.engine import Engine
from eagleray.kv_transfer.source import KVSource
from eagleray.workers.build import WorkerParts
from eagleray.workers.hand_over import Schedule, SourceHandOver
from eagleray.workers.worker import Worker


def build_prefill_worker(parts: WorkerParts) -> Worker:
    """Not started yet. Raises ``ConfigError`` when the source cannot listen on ``parts.host``."""
    engine = Engine(parts.executor, parts.engine, parts.clock, parts.new_text_stream)

    def new_source(on_released: Callable[[str], None]) -> KVSource:
        return KVSource(parts.region(), parts.executor.kv, parts.clock, parts.transfer, on_released, parts.block_ops)

    def new_hand_over(schedule: Schedule) -> SourceHandOver:
        return SourceHandOver(new_source, schedule)

    return parts.assemble(Role.PREFILL, engine, new_hand_over)
