"""What the machine allows: bytes and operations of a step, over what this machine reads and multiplies per second."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import torch
from interference import undisturbed

from eagleray.core.kv_layout import DTYPE_BYTES
from eagleray.models.model_config import ModelConfig

_PIECE_BYTES: Final = 256 * 2**20  # far more than any cache
_NUM_PIECES: Final = 4
_GEMM_SHAPE: Final = (1024, 2048, 4096)
_REPEATS: Final = 5
_CHILD_DEADLINE_S: Final = 600.0
WEIGHT_BYTES: Final = {"none": None, "w8a8": 1.0, "int8": 1.0, "int4": 0.5}  # per weight; None: of the format


@dataclass(frozen=True)
class Work:
    """Of one step. Embedding rows, norms and activations are left out; of the KV, what is read."""

    num_bytes: float
    flop: float


@dataclass(frozen=True)
class Machine:
    """Measured in this run, with as many threads as the engine has."""

    read_bytes_per_s: float
    flop_per_s: float  # of torch's large product in the engine's format, or in float32 if that is faster
    others_share: float = 0.0  # of the cores, what other processes used meanwhile

    def floor_s(self, work: Work) -> float:
        """No step that reads and multiplies so much is shorter."""
        return max(work.num_bytes / self.read_bytes_per_s, work.flop / self.flop_per_s)


def step_work(config: ModelConfig, dtype: str, bytes_per_weight: float, first: int, last: int, batch: int) -> Work:
    """``batch`` sequences that compute the tokens at positions ``first`` to ``last - 1`` each, and sample one."""
    num_tokens = batch * (last - first)
    weights, head = layer_weights(config), config.vocab_size * config.hidden_size
    kv_bytes = config.num_layers * 2 * config.num_kv_heads * config.head_dim * DTYPE_BYTES[dtype]
    # A query at position p attends to p + 1 keys: a product with each key, and one with each value.
    num_pairs = batch * (last * (last + 1) - first * (first + 1)) / 2
    attention_flop = 4 * config.num_layers * config.num_heads * config.head_dim * num_pairs
    return Work(
        num_bytes=bytes_per_weight * (weights + head) + batch * last * kv_bytes,
        flop=2 * weights * num_tokens + 2 * head * batch + attention_flop,
    )


def shortest_load_s(
    config: ModelConfig, dtype: str, machine: Machine, *, requests: int, concurrency: int, prompt: int, output: int
) -> float:
    """No engine answers ``requests`` sooner: steps in which all that are in flight decode, at half of their output, and
    each prompt computed within such a step, which reads the weights anyway."""
    bytes_per_element = float(DTYPE_BYTES[dtype])
    decode = step_work(config, dtype, bytes_per_element, prompt + output // 2, prompt + output // 2 + 1, concurrency)
    prefill = step_work(config, dtype, bytes_per_element, 0, prompt, 1)
    num_steps = requests * (output - 1) / concurrency
    mixed_s = machine.floor_s(Work(decode.num_bytes, decode.flop + prefill.flop))
    return requests * mixed_s + max(0.0, num_steps - requests) * machine.floor_s(decode)


def layer_weights(config: ModelConfig) -> int:
    """Elements of all linear layers but the head."""
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * query + 2 * kv)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def bytes_per_weight(config: ModelConfig, dtype: str, quantization: str) -> float:
    """As few as hold what the checkpoint knows: float32 made from bfloat16 has two bytes of information."""
    return WEIGHT_BYTES[quantization] or min(DTYPE_BYTES[dtype], DTYPE_BYTES[config.dtype])


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own: with what computes here on several threads the engine would share them."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result(_CHILD_DEADLINE_S)


def measure_machine(dtype: str, num_threads: int) -> Machine:
    """The best of several repeats each, undisturbed if it can be had: a floor of a busy machine flatters everybody."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        dtypes = {getattr(torch, dtype), torch.float32}
        rates, others_share = undisturbed(lambda: (_read_bytes_per_s(), max(map(_flop_per_s, dtypes))))
        return Machine(*rates, others_share)
    finally:
        torch.set_num_threads(before)


def _read_bytes_per_s() -> float:
    """Of the piece that is read fastest, in the faster of two ways. Which way it is differs from CPU to CPU by nearly a
    factor of two; how fast a piece is read depends, in a virtual machine, on where it lies, and all are there at once
    so that they lie apart."""
    vector = torch.ones(4096)
    pieces = [_in_huge_pages(_PIECE_BYTES).view(-1, 4096).fill_(1.0) for _ in range(_NUM_PIECES)]
    return _PIECE_BYTES / min(min(_shortest_s(lambda m=m: m @ vector), _shortest_s(m.sum)) for m in pieces)


def _in_huge_pages(num_bytes: int) -> torch.Tensor:
    """float32, where the system has such pages: a virtual machine reads others up to a third slower
    (docs/decisions/0024-weights-in-huge-pages.md), which is no limit of the machine."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def _flop_per_s(dtype: torch.dtype) -> float:
    rows, depth, columns = _GEMM_SHAPE
    x, weight = torch.ones(rows, depth, dtype=dtype), torch.ones(columns, depth, dtype=dtype)
    return 2 * rows * depth * columns / _shortest_s(lambda: torch.nn.functional.linear(x, weight))


def _shortest_s(action: Callable[[], object]) -> float:
    action()
    durations_s = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        action()
        durations_s.append(time.perf_counter() - start_s)
    return min(durations_s)
