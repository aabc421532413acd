"""Choosing the next token: torch beside the native library, in milliseconds per step.

    python benchmarks/kernels/sampling.py
    python benchmarks/kernels/sampling.py --shapes 32x4096 8x152000 --threads 2 --repeats 20

Logits are normal with a standard deviation of 3. Both ways must choose the same tokens, or the program ends.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from eagleray.kernels.sampling.batch import MinP, RandomRows, SamplingBatch, TopKTopP
from eagleray.kernels.select import TORCH_KERNELS, select_kernels

DEVIATION: Final = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    native = select_kernels("native", torch.float32, "cpu", options.threads)
    table = Table("rows", "vocabulary", "sampling", "torch, ms", "native, ms", "ratio", header_style="bold")
    for num_rows, vocab_size in options.shapes:
        logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * DEVIATION
        for name, batch in batches(num_rows, vocab_size).items():
            ways = [partial(kernels.sample_tokens, logits, batch) for kernels in (TORCH_KERNELS, native)]
            if not torch.equal(ways[0](), ways[1]()):
                print(f"sampling: torch and native disagree: {num_rows} x {vocab_size}, {name}", file=sys.stderr)
                return 1
            torch_ms, native_ms = medians_ms(ways, options.repeats)
            figures = (f"{torch_ms:.3f}", f"{native_ms:.3f}", f"{torch_ms / native_ms:.1f}")
            table.add_row(f"{num_rows}", f"{vocab_size:,}", name, *figures)
    Console().print(table)
    return 0


def batches(num_rows: int, vocab_size: int) -> dict[str, SamplingBatch]:
    """What every row asks for, by name."""
    rows = torch.arange(num_rows)

    def top(top_k: int, top_p: float) -> TopKTopP:
        shares = torch.full((num_rows,), top_p, dtype=torch.float64)
        return TopKTopP(rows, torch.full((num_rows,), top_k), shares, top_k)

    def draws(top_k_top_p: TopKTopP | None = None, min_p: MinP | None = None) -> SamplingBatch:
        temperature = torch.full((num_rows,), 0.8)
        choice = torch.zeros(num_rows, dtype=torch.int64)
        return SamplingBatch(random=RandomRows(rows, temperature, rows, choice, rows + 5, top_k_top_p, min_p))

    return {
        "greedy": SamplingBatch(),
        "temperature": draws(),
        "top-k 50": draws(top(50, 1.0)),
        "top-p 0.9": draws(top(vocab_size, 0.9)),
        "top-k 20, top-p 0.95": draws(top(20, 0.95)),
        "min-p 0.05": draws(min_p=MinP(rows, torch.full((num_rows,), 0.05))),
    }


def medians_ms(ways: Sequence[Callable[[], torch.Tensor]], repeats: int) -> list[float]:
    """Of each way; they take turns, so that whatever else the machine does meets all of them."""
    durations_s: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, durations in zip(ways, durations_s, strict=True):
            start_s = time.perf_counter()
            way()
            durations.append(time.perf_counter() - start_s)
    return [statistics.median(durations) * 1000 for durations in durations_s]


def _shape(text: str) -> tuple[int, int]:
    rows, _, vocab_size = text.partition("x")
    return int(rows), int(vocab_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sampling.py", description="Time the choice of the next token.")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="ROWSxVOCABULARY",
        default=[(32, 4096), (32, 32_000), (8, 152_000), (1, 152_000)])  # fmt: skip
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    return parser


if __name__ == "__main__":
    sys.exit(main())
