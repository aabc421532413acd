"""A decode worker: an engine, and a receiver that pulls KV into reserved blocks.

With an empty prefill pool it is an aggregated worker: nothing is pulled, everything is computed here.
"""

from __future__ import annotations

from eagleray.core.snapshot import Role
from eagleray.engine.engine import Engine
from eagleray.kv_transfer.receiver import KVReceiver
from eagleray.kv_transfer.transport import Transport
from eagleray.workers.build import WorkerParts
from eagleray.workers.hand_over import ReaderHandOver, Schedule
from eagleray.workers.worker import Worker


def build_decode_worker(parts: WorkerParts, transports: list[Transport]) -> Worker:
    """Not started yet. ``transports`` in order of preference."""
    engine = Engine(parts.executor, parts.engine, parts.clock, parts.new_text_stream, parts.draft_policy)
    receiver = KVReceiver(parts.executor.layout, parts.executor.kv, parts.clock, parts.transfer, transports)

    def new_hand_over(schedule: Schedule) -> ReaderHandOver:
        return ReaderHandOver(parts.region(), receiver, schedule)

    return parts.assemble(Role.DECODE, engine, new_hand_over)
