"""How fast attention of one layer is in bfloat16, beside what the machine allows and beside torch's SDPA.

    python benchmarks/kernels/attention.py --threads 2

Shapes are those of Qwen3-0.6B. Prefill is counted in floating-point operations (half of the square is computed), decode
in bytes of keys and values. SDPA reads contiguous keys and values, without pages, which favours it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from eagleray.kernels.paged_attention.plan import plan_attention
from eagleray.kernels.select import Kernels, select_kernels

sys.path.append(str(Path(__file__).resolve().parent.parent))
from floors import measure_machine
from provenance import provenance

NUM_HEADS: Final = 16
NUM_KV_HEADS: Final = 8
HEAD_DIM: Final = 128
BLOCK_SIZE_TOKENS: Final = 16
_COLD_BYTES: Final = 1 << 28  # layers are visited in turn, so that no cache keeps what a step of a model would evict


@dataclass(frozen=True)
class Case:
    batch: int
    prefix_tokens: int  # per sequence
    new_tokens: int

    @property
    def kv_bytes(self) -> int:
        return self.batch * (self.prefix_tokens + self.new_tokens) * NUM_KV_HEADS * HEAD_DIM * 2 * 2

    @property
    def flop(self) -> float:
        pairs = self.new_tokens * (self.prefix_tokens + self.new_tokens / 2)
        return 4 * NUM_HEADS * HEAD_DIM * self.batch * pairs

    @property
    def num_layers(self) -> int:
        return 1 if self.new_tokens > 1 else min(28, max(1, _COLD_BYTES // self.kv_bytes))

    def __str__(self) -> str:
        kind = "decode" if self.new_tokens == 1 else "prefill"
        return f"{kind} {self.batch} x {self.prefix_tokens + self.new_tokens}"


CASES: Final = (
    *(Case(batch, 0, tokens) for batch, tokens in ((1, 1024), (4, 256), (1, 4096))),
    *(Case(batch, keys - 1, 1) for batch in (1, 8, 32) for keys in (128, 512, 2048)),
)


def paged(kernels: Kernels, case: Case) -> Callable[[int], object]:
    """Attention of a layer, over a pool whose blocks are scattered."""
    num_blocks = -(-(case.prefix_tokens + case.new_tokens) // BLOCK_SIZE_TOKENS)
    shape = (case.batch * num_blocks, case.num_layers, 2, NUM_KV_HEADS, BLOCK_SIZE_TOKENS, HEAD_DIM)
    pool = torch.empty(shape, dtype=torch.bfloat16).normal_()
    tables = torch.randperm(len(pool)).view(case.batch, num_blocks).tolist()
    starts = range(0, case.batch * case.new_tokens + 1, case.new_tokens)
    plan = plan_attention(starts, [case.prefix_tokens] * case.batch, tables, BLOCK_SIZE_TOKENS, "cpu")
    query = torch.randn(starts[-1], NUM_HEADS, HEAD_DIM).bfloat16()
    return lambda layer: kernels.paged_attention(query, pool[:, layer], plan, HEAD_DIM**-0.5, None)


def sdpa(case: Case) -> Callable[[int], object]:
    """In decode the heads that share keys are rows of one query: SDPA's own grouping is slow there."""
    shape = (case.batch, NUM_KV_HEADS, case.prefix_tokens + case.new_tokens, HEAD_DIM)
    keys, values = torch.empty((2, case.num_layers, *shape), dtype=torch.bfloat16).normal_()
    group = NUM_HEADS // NUM_KV_HEADS
    is_prefill = case.new_tokens > 1
    heads, rows = (NUM_HEADS, case.new_tokens) if is_prefill else (NUM_KV_HEADS, group)
    query = torch.randn(case.batch, heads, rows, HEAD_DIM).bfloat16()
    attend = partial(scaled_dot_product_attention, is_causal=is_prefill, enable_gqa=is_prefill)
    return lambda layer: attend(query, keys[layer], values[layer])


def interleaved_medians_s(actions: list[Callable[[int], object]], num_layers: int, repeats: int) -> list[float]:
    """Per layer; the actions take turns, so that what disturbs one disturbs all."""
    times_s: list[list[float]] = [[] for _ in actions]
    for repeat in range(repeats + 1):
        for action, found in zip(actions, times_s, strict=True):
            start_s = time.perf_counter()
            for layer in range(num_layers):
                action(layer)
            if repeat > 0:  # the first is warm-up
                found.append((time.perf_counter() - start_s) / num_layers)
    return [statistics.median(found) for found in times_s]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    machine = measure_machine("bfloat16", arguments.threads)
    torch.set_num_threads(arguments.threads)
    kernels = select_kernels("auto", torch.bfloat16, "cpu", arguments.threads)
    print(provenance())
    print(f"{kernels.description}; limits: {machine}")
    for case in CASES:
        ours_s, torch_s = interleaved_medians_s([paged(kernels, case), sdpa(case)], case.num_layers, arguments.repeats)
        if case.new_tokens > 1:
            rate, share = f"{case.flop / ours_s / 1e12:6.2f} TFLOP/s", case.flop / ours_s / machine.flop_per_s
        else:
            rate, share = f"{case.kv_bytes / ours_s / 1e9:6.1f} GB/s", case.kv_bytes / ours_s / machine.read_bytes_per_s
        print(f"{case!s:18} {ours_s * 1e3:9.3f} ms {rate:16} {share:4.0%} of the limit   SDPA {torch_s * 1e3:9.3f} ms")


if __name__ == "__main__":
    main()
