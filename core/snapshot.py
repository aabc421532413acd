"""What routers, scaling policies, the planner and the live page see of a worker. Plain data, sent by the worker."""

from __future__ import annotations

from enum import Enum

import msgspec

from eagleray.core.acceptance import Acceptance


class Role(str, Enum):
    PREFILL = "prefill"
    DECODE = "decode"  # with an empty prefill pool, decode workers do both


class WorkerSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """State of one worker at one moment. Times are durations measured by the worker's own clock."""

    worker_id: str
    role: Role
    epoch: int
    number: int = 0  # counts what this worker took; one that is idle or in a long step repeats its last one
    step_running_s: float = 0.0  # how long the step under way has been running when this was sent
    pid: int = 0  # of the worker's process, on its host
    num_waiting: int = 0
    num_running: int = 0
    num_reserved: int = 0  # decode: leases whose KV is still on its way
    num_handed_over: int = 0  # prefill: leases held for readers
    uncomputed_tokens: int = 0  # over waiting and running requests: the prefill backlog
    blocks_total: int = 0
    blocks_free: int = 0  # cached blocks that nobody references count as free
    blocks_cached: int = 0
    prefill_tokens_per_s: float = 0.0  # smoothed; 0 until measured
    decode_step_s: float = 0.0  # smoothed time of a step that only decodes; 0 until measured
    num_preemptions: int = 0
    cached_tokens_total: int = 0
    prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    transfer_bytes_total: int = 0
    transfer_bytes_per_s: float = 0.0  # smoothed speed of copying and verifying; 0 until measured
    transfer_failures_total: int = 0
    acceptance: Acceptance | None = None  # of all decoding so far, where the worker guesses; each step's time once

    @property
    def kv_occupancy(self) -> float:
        return 1.0 - self.blocks_free / self.blocks_total if self.blocks_total else 0.0
