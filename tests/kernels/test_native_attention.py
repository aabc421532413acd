"""The native attention against the torch twin in float64, and against itself however the work was cut."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from eagleray.kernels.kv_ops.reference import write_kv
from eagleray.kernels.native.library import NativeLibrary
from eagleray.kernels.paged_attention import native, reference
from eagleray.kernels.paged_attention.plan import AttentionPlan, plan_attention

Load = Callable[..., NativeLibrary]
LONG = 1300  # keys: three splits
PAIR_LEVELS = ("amx", "avx512_bf16")  # where bfloat16 is multiplied as it is


@dataclass(frozen=True)
class Shape:
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size_tokens: int = 16
    window: int | None = None

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


class Sequences:
    """Keys, values and queries of whole sequences, in one layer of a pool where everything unwritten is NaN."""

    def __init__(self, shape: Shape, lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        self.shape, self.lengths = shape, lengths
        blocks = [-(-length // shape.block_size_tokens) for length in lengths]
        pool = torch.full(
            (sum(blocks) + 1, 3, 2, shape.num_kv_heads, shape.block_size_tokens, shape.head_dim), math.nan, dtype=dtype
        )
        self.kv_layer = pool[:, 1]
        free = torch.randperm(len(pool), generator=generator).tolist()
        self.tables = [[free.pop() for _ in range(count)] for count in blocks]
        key, value = torch.randn(2, sum(lengths), shape.num_kv_heads, shape.head_dim, generator=generator).to(dtype)
        write_kv(self.kv_layer, key, value, self.plan(range(len(lengths)), lengths).slots_T)
        queries = torch.randn(sum(lengths), shape.num_heads, shape.head_dim, generator=generator).to(dtype)
        self.queries = queries.split(list(lengths))

    def plan(self, chosen: Sequence[int], counts: Sequence[int]) -> AttentionPlan:
        """The last ``counts`` tokens of the ``chosen`` sequences."""
        starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
        prefixes = [self.lengths[b] - count for b, count in zip(chosen, counts, strict=True)]
        tables = [self.tables[b] for b in chosen]
        return plan_attention(starts, prefixes, tables, self.shape.block_size_tokens, "cpu")

    def query(self, chosen: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        return torch.cat([self.queries[b][-count:] for b, count in zip(chosen, counts, strict=True)])

    def ours(self, library: NativeLibrary, chosen: Sequence[int], counts: Sequence[int]) -> list[torch.Tensor]:
        query, plan = self.query(chosen, counts), self.plan(chosen, counts)
        output = native.paged_attention(library, query, self.kv_layer, plan, self.shape.scale, self.shape.window)
        return list(output.split(list(counts)))

    def exact(self, chosen: Sequence[int], counts: Sequence[int]) -> list[torch.Tensor]:
        query, plan = self.query(chosen, counts).double(), self.plan(chosen, counts)
        output = reference.paged_attention(query, self.kv_layer.double(), plan, self.shape.scale, self.shape.window)
        return list(output.split(list(counts)))


SHAPES = [
    Shape(),
    Shape(num_kv_heads=4),
    Shape(num_heads=10, num_kv_heads=2, head_dim=80),
    Shape(num_heads=50, num_kv_heads=1, head_dim=16),  # one token's heads fill more than one tile
    Shape(num_heads=1, num_kv_heads=1, head_dim=12, block_size_tokens=1),
    Shape(head_dim=256, block_size_tokens=5),
    Shape(head_dim=3, block_size_tokens=128),
    Shape(window=1),
    Shape(window=70),
    Shape(window=600, block_size_tokens=4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(library: NativeLibrary, shape: Shape) -> None:
    lengths, counts = [1, 63, 64, 65, 200, LONG, 300], [1, 1, 1, 1, 30, 2, 300]
    sequences = Sequences(shape, lengths)
    chosen = range(len(lengths))
    for ours, exact in zip(sequences.ours(library, chosen, counts), sequences.exact(chosen, counts), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("chosen", "counts"), [([0, 1, 2], [3, 1, 40]), ([1], [1])], ids=["tiles", "splits"])
def test_a_row_that_is_not_a_number_stays_so_and_leaves_the_others_as_they_were(
    library: NativeLibrary, load: Load, dtype: torch.dtype, chosen: list[int], counts: list[int]
) -> None:
    sequences = Sequences(Shape(), [40, LONG, 700], dtype)
    library = load(library.level, 2)
    whole = torch.cat(sequences.ours(library, chosen, counts))
    for queries in sequences.queries:
        queries[-1, 1] = math.nan
    ours = torch.cat(sequences.ours(library, chosen, counts))
    exact = torch.cat(sequences.exact(chosen, counts))
    assert torch.equal(ours.isnan(), exact.isnan())
    assert ours.isnan().any()
    assert torch.equal(ours[~ours.isnan()], whole[~ours.isnan()])


@pytest.mark.parametrize("window", [None, 70, 300])
@pytest.mark.parametrize("head_dim", [128, 80, 12, 3])
def test_in_bfloat16_is_off_by_roundings_alone(library: NativeLibrary, head_dim: int, window: int | None) -> None:
    sequences = Sequences(Shape(window=window, head_dim=head_dim), [130, LONG, 700], torch.bfloat16)
    chosen, counts = [0, 1, 2], [130, 5, 600]
    ours, exact = sequences.ours(library, chosen, counts), sequences.exact(chosen, counts)
    sequences.kv_layer[:, 1] = sequences.kv_layer[:, 1].abs()
    for found, expected, weighted in zip(ours, exact, sequences.exact(chosen, counts), strict=True):
        assert found.dtype is torch.bfloat16
        # The output is rounded, and where pairs are multiplied so is each weight, by up to 2^-8; exp is off by less.
        rounding = 2**-8 * expected.abs() + (1.05 * 2**-8 * weighted if library.level in PAIR_LEVELS else 1e-5)
        assert bool(((found.double() - expected).abs() <= rounding).all())


def test_reads_a_bfloat16_cache_with_a_float32_query(library: NativeLibrary) -> None:
    sequences = Sequences(Shape(), [90, 7], torch.bfloat16)
    sequences.queries = tuple(query.float() for query in sequences.queries)
    ours, exact = sequences.ours(library, [0, 1], [1, 7]), sequences.exact([0, 1], [1, 7])
    for found, expected in zip(ours, exact, strict=True):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)


def test_takes_queries_as_a_view_of_a_wider_row(load: Load) -> None:
    sequences = Sequences(Shape(), [40, 90])
    query, plan = sequences.query([0, 1], [40, 1]), sequences.plan([0, 1], [40, 1])
    rows = torch.cat((query, torch.full((41, 3, 64), math.nan)), dim=1)[:, :4]
    assert not rows.is_contiguous()
    outputs = [native.paged_attention(load(), q, sequences.kv_layer, plan, 0.2, None) for q in (query, rows)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(num_heads=6, head_dim=80),
        Shape(window=100),
        Shape(num_heads=16, num_kv_heads=8, head_dim=128),
        Shape(num_heads=7, num_kv_heads=7, head_dim=12, block_size_tokens=5, window=300),
        Shape(num_heads=50, num_kv_heads=2, head_dim=32, block_size_tokens=24),
    ],
    ids=str,
)
def test_a_token_gets_the_same_bits_alone_in_a_batch_and_in_any_chunk(
    library: NativeLibrary, shape: Shape, dtype: torch.dtype
) -> None:
    lengths = [100, LONG, 530, 64]
    sequences = Sequences(shape, lengths, dtype)
    whole = [sequences.ours(library, [b], [length])[0] for b, length in enumerate(lengths)]
    for counts in ([1, 1, 1, 1], [7, 1, 40, 64], [100, 900, 1, 2]):
        for b, output in enumerate(sequences.ours(library, range(4), counts)):
            assert torch.equal(output, whole[b][-counts[b] :]), (b, counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(library: NativeLibrary, load: Load, dtype: torch.dtype) -> None:
    sequences = Sequences(Shape(), [LONG, 3000, 40], dtype)
    for chosen, counts in (([0], [1]), ([1], [20]), ([0, 1, 2], [1, 1, 1]), ([0, 1, 2], [1, 700, 40])):
        one, two, many = (sequences.ours(load(library.level, count), chosen, counts) for count in (1, 2, 5))
        for b in range(len(chosen)):
            assert torch.equal(one[b], two[b])
            assert torch.equal(one[b], many[b])


_MANY_SPLITS = """
import sys, torch
from pathlib import Path
from eagleray.kernels.native.library import load_library
from eagleray.kernels.paged_attention.native import paged_attention
from eagleray.kernels.paged_attention.plan import plan_attention

library = load_library(sys.argv[1], Path(sys.argv[2]), num_threads=4)
kv_layer = torch.randn(1, 1, 2, 4, 128, 16)[:, 0]

def peak_kib():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmPeak"))
    return int(line.split()[1])

def attend(num_blocks):
    plan = plan_attention([0, 1], [num_blocks * 128 - 1], [[0] * num_blocks], 128, "cpu")
    paged_attention(library, torch.randn(1, 4, 16), kv_layer, plan, 0.25, None)

attend(8)  # two splits: the threads and their stacks are there
before_kib = peak_kib()
attend(1024)  # 4 heads of 256 splits
print(peak_kib() - before_kib)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_long_context_takes_no_more_memory_than_a_short_one_but_for_a_fixed_amount(
    load: Load, cache_folder: Path
) -> None:
    command = [sys.executable, "-c", _MANY_SPLITS, load().level, str(cache_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 16 * 1024  # KiB; all splits at one time would be 50 MB


def test_a_tile_whose_splits_are_joined_in_several_rounds_has_the_same_bits(library: NativeLibrary, load: Load) -> None:
    sequences = Sequences(Shape(num_heads=3, num_kv_heads=3, head_dim=16), [30_000])
    several = load(library.level, num_threads=4)
    one, many = sequences.ours(library, [0], [1]), sequences.ours(several, [0], [1])
    assert torch.equal(one[0], many[0])
    torch.testing.assert_close(one[0].double(), sequences.exact([0], [1])[0], rtol=0, atol=3e-6)


def test_a_block_outside_the_pool_is_an_error_not_a_wild_read(load: Load) -> None:
    sequences = Sequences(Shape(), [40])
    for outside in (-1, len(sequences.kv_layer)):
        sequences.tables[0][1] = outside
        with pytest.raises(IndexError, match="outside the pool"):
            sequences.ours(load(), [0], [1])


def test_a_pool_whose_pages_are_not_contiguous_is_refused(load: Load) -> None:
    sequences = Sequences(Shape(), [40])
    sequences.kv_layer = sequences.kv_layer.transpose(3, 4).contiguous().transpose(3, 4)
    with pytest.raises(ValueError, match="contiguous pool"):
        sequences.ours(load(), [0], [1])


def test_a_plan_of_another_batch_or_pool_is_refused(load: Load) -> None:
    sequences, other = Sequences(Shape(), [40]), Sequences(Shape(block_size_tokens=8), [40])
    for plan in (sequences.plan([0], [2]), other.plan([0], [1])):
        with pytest.raises(ValueError, match="the plan is for"):
            native.paged_attention(load(), sequences.query([0], [1]), sequences.kv_layer, plan, 0.2, None)


def test_a_head_that_is_too_long_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match="head_dim is 257"):
        Sequences(Shape(head_dim=257), [4]).ours(load(), [0], [1])
