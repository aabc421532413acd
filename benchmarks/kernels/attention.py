"""How fast attention of one layer is in bfloat16, beside what the machine allows and beside torch's SDPA.

    python benchmarks/kernels/attention.py --threads 2 --json attention.json --markdown > attention.md

Shapes are those of Qwen3-0.6B. Prefill is counted in floating-point operations (half of the square is computed), decode
in bytes of keys and values: beside reading the same memory in the same order, by the same number of threads, and doing
nothing with it. SDPA reads contiguous keys and values, without pages, which favours it. All ways take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import torch
from limits import Limits, ProductLimit
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from eagleray.kernels.paged_attention.plan import plan_attention
from eagleray.kernels.select import Kernels, select_kernels

sys.path.append(str(Path(__file__).resolve().parent.parent))
from floors import Machine, measure_machine
from interference import mark
from provenance import Provenance, provenance
from report import Section, to_markdown, to_terminal
from turns import Action, time_in_turns

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


PREFILL: Final = tuple(Case(batch, 0, tokens) for batch, tokens in ((1, 1024), (4, 256), (1, 4096)))
DECODE: Final = tuple(Case(batch, keys - 1, 1) for batch in (1, 8, 32) for keys in (128, 512, 2048))
OURS: Final = "eagleray"
SDPA: Final = "SDPA"
PAGES: Final = "pages read alone, GB/s"
BLOCKS: Final = "blocks read alone, GB/s"


@dataclass(frozen=True)
class Order:
    """A pool whose blocks are scattered, and in which order a step reads it."""

    pool: torch.Tensor  # [blocks, layers, 2, heads, tokens of a block, head_dim]
    tables: list[list[int]]  # blocks of every sequence
    offsets: torch.Tensor  # of these blocks in a layer of the pool, in bytes
    heads_together: int  # that one thread takes of a sequence: their pages are neighbours

    @property
    def page_bytes(self) -> int:
        return BLOCK_SIZE_TOKENS * HEAD_DIM * self.pool.element_size()

    @property
    def blocks_together(self) -> int:
        """As many bytes as a thread takes at once of heads."""
        return max(1, len(self.tables[0]) * self.heads_together // NUM_KV_HEADS)


def scattered(case: Case, num_threads: int) -> Order:
    num_blocks = -(-(case.prefix_tokens + case.new_tokens) // BLOCK_SIZE_TOKENS)
    shape = (case.batch * num_blocks, case.num_layers, 2, NUM_KV_HEADS, BLOCK_SIZE_TOKENS, HEAD_DIM)
    pool = torch.empty(shape, dtype=torch.bfloat16).normal_()
    blocks = torch.randperm(len(pool))
    tables = blocks.view(case.batch, num_blocks).tolist()
    offsets = blocks * (pool.stride(0) * pool.element_size())
    return Order(pool, tables, offsets, max(1, NUM_KV_HEADS // num_threads))


def paged(kernels: Kernels, case: Case, order: Order) -> Action:
    """Attention of all layers."""
    starts = range(0, case.batch * case.new_tokens + 1, case.new_tokens)
    plan = plan_attention(starts, [case.prefix_tokens] * case.batch, order.tables, BLOCK_SIZE_TOKENS, "cpu")
    query = torch.randn(starts[-1], NUM_HEADS, HEAD_DIM).bfloat16()

    def attend(_: int) -> None:
        for layer in range(case.num_layers):
            kernels.paged_attention(query, order.pool[:, layer], plan, HEAD_DIM**-0.5, None)

    return attend


def sdpa(case: Case) -> Action:
    """In decode the heads that share keys are rows of one query: SDPA's own grouping is slow there."""
    shape = (case.batch, NUM_KV_HEADS, case.prefix_tokens + case.new_tokens, HEAD_DIM)
    keys, values = torch.empty((2, case.num_layers, *shape), dtype=torch.bfloat16).normal_()
    group = NUM_HEADS // NUM_KV_HEADS
    is_prefill = case.new_tokens > 1
    heads, rows = (NUM_HEADS, case.new_tokens) if is_prefill else (NUM_KV_HEADS, group)
    query = torch.randn(case.batch, heads, rows, HEAD_DIM).bfloat16()
    attend = partial(scaled_dot_product_attention, is_causal=is_prefill, enable_gqa=is_prefill)

    def attend_all(_: int) -> None:
        for layer in range(case.num_layers):
            attend(query, keys[layer], values[layer])

    return attend_all


def whole_blocks(limits: Limits, case: Case, order: Order) -> Action:
    """Reads the same blocks in the same order, each in one piece, and does nothing with them."""
    return _reading(limits, case, order, order.offsets, order.page_bytes * 2 * NUM_KV_HEADS, order.blocks_together)


def pages_by_head(limits: Limits, case: Case, order: Order) -> Action:
    """Reads in the order of attention itself: of one head after the other the pages of keys and of values."""
    head = torch.arange(NUM_KV_HEADS).view(1, -1, 1, 1) * order.page_bytes
    kind = torch.arange(2).view(1, 1, 1, 2) * NUM_KV_HEADS * order.page_bytes
    offsets = (order.offsets.view(case.batch, 1, -1, 1) + head + kind).flatten()
    together = order.heads_together * 2 * (len(order.offsets) // case.batch)
    return _reading(limits, case, order, offsets, order.page_bytes, together)


def _reading(
    limits: Limits, case: Case, order: Order, offsets: torch.Tensor, piece_bytes: int, together: int
) -> Action:
    def read(_: int) -> None:
        for layer in range(case.num_layers):
            limits.read(order.pool[:, layer].data_ptr(), offsets, piece_bytes, together)

    return read


@dataclass(frozen=True)
class Row:
    """One case."""

    case: str
    ways: Mapping[str, float]  # name -> median of a layer, in seconds
    rates: Mapping[str, float]  # name -> FLOP/s of prefill, bytes of keys and values per second of decode
    others_share: float  # of the cores, what other processes used meanwhile


@dataclass(frozen=True)
class Run:
    """Everything about one run."""

    origin: Provenance
    kernels: str
    machine: Machine
    product_limit: ProductLimit
    prefill: Sequence[Row]
    decode: Sequence[Row]

    def title(self) -> str:
        return (
            f"attention of one layer in bfloat16, {self.kernels}, {self.origin.num_cores} x {self.origin.cpu}, commit "
            f"{self.origin.git_commit}, {self.origin.date}; one long stream reads "
            f"{self.machine.read_bytes_per_s / 1e9:.1f} GB/s; torch's largest product has "
            f"{self.machine.flop_per_s / 1e12:.2f} TFLOP/s{mark(self.machine.others_share)}; "
            f"{self.product_limit}"
        )


def measure(case: Case, kernels: Kernels, limits: Limits, num_threads: int, duration_s: float) -> Row:
    order = scattered(case, num_threads)
    ways: dict[str, Action] = {OURS: paged(kernels, case, order), SDPA: sdpa(case)}
    if case.new_tokens == 1:
        ways |= {BLOCKS: whole_blocks(limits, case, order), PAGES: pages_by_head(limits, case, order)}
    turns = time_in_turns(ways, duration_s)
    medians_s = {name: median_s / case.num_layers for name, median_s in turns.medians_s.items()}
    amount = case.flop if case.new_tokens > 1 else case.kv_bytes
    rates = {name: amount / median_s for name, median_s in medians_s.items()}
    return Row(str(case), medians_s, rates, turns.others_share)


def sections(run: Run) -> list[Section]:
    prefill = [
        (
            row.case, f"{row.ways[OURS] * 1e3:.3f}", f"{row.rates[OURS] / 1e12:.2f}",
            f"{row.rates[OURS] / run.machine.flop_per_s:.0%}", f"{row.ways[SDPA] * 1e3:.3f}", _others(row),
        )
        for row in run.prefill
    ]  # fmt: skip
    decode = [
        (
            row.case, f"{row.ways[OURS] * 1e3:.3f}", *(f"{row.rates[way] / 1e9:.1f}" for way in (OURS, PAGES, BLOCKS)),
            f"{row.rates[OURS] / row.rates[PAGES]:.0%}", f"{row.rates[OURS] / run.machine.read_bytes_per_s:.0%}",
            f"{row.ways[SDPA] * 1e3:.3f}", _others(row),
        )
        for row in run.decode
    ]  # fmt: skip
    header = ("decode", "ms", "GB/s", PAGES, BLOCKS, "of the pages", "of one stream", "SDPA, ms", "others")
    return [
        Section(("prefill", "ms", "TFLOP/s", "of the product", "SDPA, ms", "others"), prefill),
        Section(header, decode),
    ]


def _others(row: Row) -> str:
    return f"{row.others_share:.1%}{mark(row.others_share)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="of attention")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args()
    machine, limits = measure_machine("bfloat16", options.threads), Limits(options.threads)
    torch.set_num_threads(options.threads)
    kernels = select_kernels("auto", torch.bfloat16, "cpu", options.threads)
    product_limit = limits.products()
    prefill, decode = (
        [measure(case, kernels, limits, options.threads, options.seconds) for case in cases]
        for cases in (PREFILL, DECODE)
    )
    run = Run(provenance(), kernels.description, machine, product_limit, prefill, decode)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(run)) + b"\n")
    if options.markdown:
        print(f"{run.title()}\n\n{to_markdown(sections(run))}")
    else:
        Console().print(run.title(), to_terminal(sections(run)), sep="\n", highlight=False, markup=False)


if __name__ == "__main__":
    main()
