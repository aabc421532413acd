"""How fast KV blocks get from one process to another, beside a plain memcpy of the same bytes.

    python benchmarks/handover.py                       # all transports and layouts
    python benchmarks/handover.py --transports shared_memory --json result.json --markdown

A hand-over is timed as a worker sees it: from telling the source process that a request has been computed to all blocks
being in and verified here. The source had no time to take fingerprints while a next chunk was computed, as it has in a
prefill worker: this is the slowest case. ``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from interference import mark, undisturbed
from provenance import Provenance, provenance
from report import Section, to_markdown, to_terminal
from rich.console import Console

from eagleray.core.clock import SystemClock
from eagleray.core.config import TransferConfig
from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.core.kv_region import KVRegion
from eagleray.engine.execution.kv_memory import HEADER_BYTES, KVMemory
from eagleray.kernels.native.library import NativeLibrary
from eagleray.kernels.select import load_best_library
from eagleray.kv_transfer.fake import Calls
from eagleray.kv_transfer.fingerprint import BlockOps
from eagleray.kv_transfer.pull import PullResult
from eagleray.kv_transfer.receiver import KVReceiver
from eagleray.kv_transfer.session import SourceProgress
from eagleray.kv_transfer.source import KVSource
from eagleray.kv_transfer.transports.select import make_transports
from eagleray.workers.block_ops import select_block_ops

LAYOUTS: Final = {
    "Qwen3-0.6B": KVLayout(16, (LayerGroup("target", 28, 8, 128, "bfloat16"),)),
    "demo": KVLayout(16, (LayerGroup("target", 8, 2, 64, "float32"),)),
}
NUM_TOKENS: Final = (512, 4096)
DEADLINE_S: Final = 60.0
SETTLE_S: Final = 0.02  # for the subscription to arrive, which a worker makes long before there is something to read


@dataclass(frozen=True)
class Line:
    """Of one transport and one length of requests; medians of all repetitions but the first, in 10^9 bytes/s."""

    layout: str
    num_tokens: int
    num_bytes: int
    transport: str
    memcpy: float
    verified: float  # a whole hand-over
    unverified: float  # without fingerprints
    first: float  # verified, into a pool that nothing was written to before
    others_share: float  # of the cores, what other processes used meanwhile


@dataclass(frozen=True)
class Hash:
    """XXH3 with 128 bits over a pool in one piece, as fingerprints take it of blocks; medians, in 10^9 bytes/s."""

    num_bytes: int
    memcpy: float
    xxh3_128: float
    others_share: float  # of the cores, what other processes used meanwhile


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    origin, lines, of_hash = provenance(), list(_measure(options)), _measure_hash(options)
    title, shown = _title(origin, [*lines, of_hash]), [_section(lines), _hash_section(of_hash)]
    if options.markdown:
        print(f"{title}\n\n{to_markdown(shown)}")
    else:
        Console().print(title, to_terminal(shown), sep="\n", highlight=False, markup=False)
    if options.json:
        everything = {"provenance": asdict(origin), "lines": [asdict(line) for line in lines], "hash": asdict(of_hash)}
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(everything)) + b"\n")
    return 0


def _measure(options: argparse.Namespace) -> Iterator[Line]:
    for name in options.layouts:
        layout = LAYOUTS[name]
        for transport in options.transports:
            with _source(layout, max(options.tokens), transport == "loopback") as source:
                for num_tokens in options.tokens:
                    measured = partial(_measure_line, name, transport, source, num_tokens, options.repeats)
                    line, others_share = undisturbed(measured, tree_pid=os.getpid())
                    yield replace(line, others_share=others_share)


def _measure_line(layout_name: str, transport: str, source: Source, num_tokens: int, repeats: int) -> Line:
    """``others_share`` is for whoever timed all of it to say."""
    layout = LAYOUTS[layout_name]
    num_blocks = num_tokens // layout.block_size_tokens
    num_bytes = num_blocks * layout.block_bytes
    origin, target = (KVMemory(layout, num_blocks, shared=True) for _ in range(2))
    readers = {verify: Reader(layout, target, transport, source, verify) for verify in (True, False)}
    seconds: dict[str, list[float]] = {"verified": [], "unverified": [], "memcpy": []}
    for _ in range(repeats):  # in turn, so that whatever else the machine does meets all of them
        seconds["verified"].append(readers[True].hand_over(num_blocks))
        seconds["unverified"].append(readers[False].hand_over(num_blocks))
        seconds["memcpy"].append(_copy_plainly(origin, target))
    for reader in readers.values():
        reader.stop()
    rates = {name: num_bytes / statistics.median(values[1:]) / 1e9 for name, values in seconds.items()}
    first = num_bytes / seconds["verified"][0] / 1e9
    return Line(layout_name, num_tokens, num_bytes, transport, first=first, others_share=0.0, **rates)


def _measure_hash(options: argparse.Namespace) -> Hash:
    """On one thread, over as many bytes as the longest requests of the first layout have."""
    layout = LAYOUTS[options.layouts[0]]
    origin, target = (KVMemory(layout, max(options.tokens) // layout.block_size_tokens, shared=True) for _ in range(2))
    blocks, fingerprint = origin.buffer[HEADER_BYTES:], _block_ops(layout, verify=True).fingerprint

    def take_turns() -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {"xxh3_128": [], "memcpy": []}
        for _ in range(options.repeats):
            start_s = time.perf_counter()
            fingerprint(layout.digest(), [blocks])
            seconds["xxh3_128"].append(time.perf_counter() - start_s)
            seconds["memcpy"].append(_copy_plainly(origin, target))
        return seconds

    seconds, others_share = undisturbed(take_turns)
    rates = {name: blocks.nbytes / statistics.median(values[1:]) / 1e9 for name, values in seconds.items()}
    return Hash(blocks.nbytes, others_share=others_share, **rates)


def _copy_plainly(origin: KVMemory, target: KVMemory) -> float:
    """Seconds for one memcpy of a whole pool into another one of the same kind."""
    views = [np.frombuffer(memory.buffer, np.uint8)[HEADER_BYTES:] for memory in (target, origin)]
    start_s = time.perf_counter()
    np.copyto(*views)
    return time.perf_counter() - start_s


# ---- the two ends


class Reader:
    """The end that wants the blocks."""

    def __init__(self, layout: KVLayout, memory: KVMemory, transport: str, source: Source, verify: bool) -> None:
        ops = _block_ops(layout, verify)
        transports = make_transports([transport], source.stores, ops)
        self._receiver = KVReceiver(layout, memory, SystemClock(), TransferConfig(), transports)
        self._layout, self._source, self._verify = layout, source, verify
        self._done = Calls[PullResult]()
        self.stop = self._receiver.stop

    def hand_over(self, num_blocks: int) -> float:
        """Seconds from the end of prefill to the end of the pull."""
        number, blocks = len(self._done.values), range(num_blocks)
        request_id = f"{uuid.uuid4().hex}-{number}"
        self._source.ask("open", self._verify, request_id)
        self._receiver.pull(request_id, self._source.regions[self._verify], 0, blocks, self._done)
        time.sleep(SETTLE_S)
        progress = SourceProgress(tuple(blocks), num_blocks * self._layout.block_size_tokens, True, (7,))
        start_s = time.perf_counter()
        self._source.ask("announce", self._verify, request_id, progress)
        result = self._done.wait(number + 1, DEADLINE_S)[-1]
        duration_s = time.perf_counter() - start_s
        if not result.complete:
            raise RuntimeError(f"the hand-over failed: {result.reason}")
        return duration_s


@dataclass(frozen=True)
class Source:
    """The end that holds the blocks, with fingerprints and without."""

    regions: dict[bool, KVRegion]
    ask: Callable[..., Any]  # (method, with fingerprints?, its arguments)
    stores: dict[str, KVMemory]  # its pool, when it is in this process


@contextmanager
def _source(layout: KVLayout, num_tokens: int, in_this_process: bool) -> Iterator[Source]:
    if in_this_process:
        memory, sources = _start_sources(layout, num_tokens)
        regions = {verify: source.region for verify, source in sources.items()}
        stores = {"source": memory}
        yield Source(regions, lambda name, verify, *rest: getattr(sources[verify], name)(*rest), stores)
        for source in sources.values():
            source.stop()
        return
    context = multiprocessing.get_context("spawn")
    pipe, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end, layout, num_tokens), daemon=True)
    process.start()
    child_end.close()

    def ask(*command: object) -> Any:
        pipe.send(command)
        return _answer(pipe)

    yield Source(_answer(pipe), ask, {})
    pipe.close()
    process.join(DEADLINE_S)
    process.kill()


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(DEADLINE_S):
        raise TimeoutError(f"the source process did not answer within {DEADLINE_S:g} s")
    return pipe.recv()


def _serve(pipe: Connection, layout: KVLayout, num_tokens: int) -> None:
    """The source process: answers until its pipe is closed."""
    _, sources = _start_sources(layout, num_tokens)
    pipe.send({verify: source.region for verify, source in sources.items()})
    while True:
        try:
            method, verify, *rest = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(sources[verify], method)(*rest))


def _start_sources(layout: KVLayout, num_tokens: int) -> tuple[KVMemory, dict[bool, KVSource]]:
    """Two on one pool of blocks that have been written: one takes fingerprints, the other one does not."""
    memory = KVMemory(layout, num_tokens // layout.block_size_tokens, shared=True)
    blocks = np.frombuffer(memory.buffer, np.uint8)[HEADER_BYTES:]
    blocks[:] = np.arange(len(blocks)) % 251
    region = KVRegion(
        "source", 1, layout, memory.num_blocks, memory.group_offsets, "127.0.0.1:0", "", memory.shared_memory_ref()
    )
    config, clock = TransferConfig(), SystemClock()
    sources = {
        verify: KVSource(region, memory, clock, config, lambda request_id: None, _block_ops(layout, verify))
        for verify in (True, False)
    }
    return memory, sources


def _block_ops(layout: KVLayout, verify: bool) -> BlockOps:
    if verify:
        return select_block_ops("auto", layout)
    library = load_best_library(1)

    def copy(layout_digest: str, origins: Sequence[memoryview], targets: Sequence[memoryview]) -> bytes:
        for origin, target in zip(origins, targets, strict=True):
            _copy(library, origin, target)
        return b""

    return BlockOps(lambda layout_digest, views: b"", copy)


def _copy(library: NativeLibrary, origin: memoryview, target: memoryview) -> None:
    first, addresses = (ctypes.c_int64 * 1)(0), [np.frombuffer(view, np.uint8).ctypes.data for view in (origin, target)]
    library.copy_blocks(*addresses, first, first, 1, origin.nbytes, 1)


# ---- what is shown


def _title(origin: Provenance, lines: Sequence[Line | Hash]) -> str:
    others = f"others used at most {max(line.others_share for line in lines):.1%} of the cores"
    return f"{origin.date}, {origin.cpu}, {origin.num_cores} cores, {origin.git_commit}; {others}"


def _section(lines: Sequence[Line]) -> Section:
    header = ("layout", "tokens", "MB", "transport", "memcpy", "hand-over", "of memcpy",
              "without fingerprint", "of memcpy", "first, fresh pool", "others")  # fmt: skip
    rows = [
        (
            line.layout, f"{line.num_tokens:,}", f"{line.num_bytes / 1e6:.1f}", line.transport,
            f"{line.memcpy:.2f}", f"{line.verified:.2f}", f"{line.verified / line.memcpy:.0%}",
            f"{line.unverified:.2f}", f"{line.unverified / line.memcpy:.0%}", f"{line.first:.2f}",
            f"{line.others_share:.1%}{mark(line.others_share)}",
        )
        for line in lines
    ]  # fmt: skip
    return Section(header, rows)


def _hash_section(of_hash: Hash) -> Section:
    header = ("hash of fingerprints", "MB", "memcpy", "hash", "of memcpy", "others")
    row = (
        "XXH3, 128 bits", f"{of_hash.num_bytes / 1e6:.1f}", f"{of_hash.memcpy:.2f}", f"{of_hash.xxh3_128:.2f}",
        f"{of_hash.xxh3_128 / of_hash.memcpy:.0%}", f"{of_hash.others_share:.1%}{mark(of_hash.others_share)}",
    )  # fmt: skip
    return Section(header, [row])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="handover.py",
        description="Hand KV blocks over between two processes, in GB/s, beside a memcpy of the same bytes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, names = parser.add_argument, ("shared_memory", "tcp", "loopback")
    add("--transports", nargs="+", choices=names, default=names, help="loopback is within one process")
    add("--layouts", nargs="+", choices=tuple(LAYOUTS), default=tuple(LAYOUTS), help="shape of the KV")
    add("--tokens", nargs="+", type=int, default=NUM_TOKENS, help="lengths of requests, in whole blocks of 16")
    add("--repeats", type=int, default=10, help="at least 2; the first one is reported apart")
    add("--json", type=Path, help="write everything to this file")
    add("--markdown", action="store_true", help="print the report as Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
