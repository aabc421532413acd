"""Each transport tried for real: another process holds blocks, this one pulls and verifies them."""

from __future__ import annotations

from typing import Final

from eagleray.cli.finding import Finding, Level
from eagleray.core.clock import SystemClock
from eagleray.core.config import TransferConfig
from eagleray.core.errors import EagleRayError
from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.kv_transfer.fake import Calls, MemoryBlockStore
from eagleray.kv_transfer.fake_process import SourceProcess
from eagleray.kv_transfer.pull import PullResult
from eagleray.kv_transfer.receiver import KVReceiver
from eagleray.kv_transfer.transports.select import make_transports

# 16 tokens of an 8-billion-parameter model in bfloat16 (32 layers, 8 KV heads of 128): 2 MiB a block.
LAYOUT: Final = KVLayout(16, (LayerGroup("target", 32, 8, 128, "bfloat16"),))
NUM_BLOCKS: Final = 64
PULL_DEADLINE_S: Final = 30.0
NUM_PULLS: Final = 3  # the first also fills page tables


def check_transports(transfer: TransferConfig) -> list[Finding]:
    """In the order in which workers try them. Loopback works within one process only, so there is nothing to try."""
    names = [name for name in transfer.transports if name != "loopback"]
    findings = [_check_transport(name, choice, transfer) for choice, name in enumerate(names, start=1)]
    return [*findings, _gpu_transports()]


def _check_transport(name: str, choice: int, transfer: TransferConfig) -> Finding:
    try:
        results = _pull_with(name, transfer)
    except (EagleRayError, OSError, TimeoutError) as error:
        return _unusable(name, str(error))
    broken = next((result for result in results if not result.complete), None)
    if broken is not None:
        return _unusable(name, "; ".join((*broken.skipped, broken.reason)))
    best = max(result.num_bytes / result.transfer_s for result in results)
    return Finding(
        Level.OK, name, f"choice {choice}: {best / 1e9:.1f} GB/s between two processes, every block verified"
    )


def _pull_with(name: str, transfer: TransferConfig) -> list[PullResult]:
    """Pull the whole pool of another process, several times, by one transport."""
    from eagleray.workers.block_ops import select_block_ops  # imports torch, which takes seconds

    with SourceProcess(LAYOUT, NUM_BLOCKS, transfer) as source:
        store, done = MemoryBlockStore(LAYOUT, NUM_BLOCKS), Calls[PullResult]()
        ops = select_block_ops("auto", LAYOUT)
        receiver = KVReceiver(LAYOUT, store, SystemClock(), transfer, make_transports([name], {}, ops))
        try:
            for number in range(NUM_PULLS):
                request_id = f"pull-{number}"
                source.open(request_id)
                receiver.pull(request_id, source.region, 0, range(NUM_BLOCKS), done)
                num_tokens = NUM_BLOCKS * LAYOUT.block_size_tokens
                source.announce(request_id, range(NUM_BLOCKS), num_tokens, is_last=True)
                done.wait(number + 1, PULL_DEADLINE_S)
            return done.values
        finally:
            receiver.stop()


def _unusable(name: str, reason: str) -> Finding:
    way_out = "take it out of transfer.transports, so that no pull tries it first"
    return Finding(Level.WARN, name, f"not usable: {reason}", way_out)


def _gpu_transports() -> Finding:
    import torch  # takes seconds: not before it is needed

    reason = "KV is kept in host memory" if torch.cuda.is_available() else "no CUDA device"
    return Finding(Level.OK, "nccl, cuda_ipc", f"not available: {reason}")
