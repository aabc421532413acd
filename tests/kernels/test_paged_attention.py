from __future__ import annotations

import math

import pytest
import torch

from eagleray.kernels.kv_ops.api import copy_blocks, write_kv
from eagleray.kernels.paged_attention.api import chain_vectors, chains_of_vectors, paged_attention, plan_attention
from eagleray.kernels.replay.api import StepIntegers

BLOCK_SIZE_TOKENS = 4
HEAD_DIM = 8
NUM_BLOCKS = 64


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """The definition, token by token and head by head in float64. query [T, H, D]: the last T of key's S tokens."""
    num_tokens, num_heads, _ = query.shape
    num_keys, num_kv_heads, _ = key.shape
    output = torch.empty(query.shape, dtype=torch.float64)
    for row in range(num_tokens):
        end = num_keys - num_tokens + row + 1
        start = 0 if window is None else max(0, end - window)
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = key[start:end, kv_head].double() @ query[row, head].double() * scale
            output[row, head] = torch.softmax(scores, dim=0) @ value[start:end, kv_head].double()
    return output


class Batch:
    """Sequences in a pool of several layers with scattered blocks, where everything unwritten is NaN."""

    def __init__(self, lengths: list[int], counts: list[int], *, num_heads: int = 4, num_kv_heads: int = 2) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        self.lengths, self.counts = lengths, counts
        pool = torch.full((NUM_BLOCKS, 3, 2, num_kv_heads, BLOCK_SIZE_TOKENS, HEAD_DIM), math.nan)
        self.kv_layer = pool[:, 1]
        free = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
        self.tables = [[free.pop() for _ in range(-(-length // BLOCK_SIZE_TOKENS))] for length in lengths]
        shape = (num_kv_heads, HEAD_DIM)
        self.keys = [torch.randn(length, *shape, generator=generator) for length in lengths]
        self.values = [torch.randn(length, *shape, generator=generator) for length in lengths]
        self.query = torch.randn(sum(counts), num_heads, HEAD_DIM, generator=generator)
        everything = plan_attention(self.starts(lengths), [0] * len(lengths), self.tables, BLOCK_SIZE_TOKENS, "cpu")
        write_kv(self.kv_layer, torch.cat(self.keys), torch.cat(self.values), everything.slots_T)

    @staticmethod
    def starts(counts: list[int]) -> list[int]:
        return [sum(counts[:index]) for index in range(len(counts) + 1)]

    def ours(self, window: int | None, scale: float = 0.3) -> torch.Tensor:
        prefixes = [length - count for length, count in zip(self.lengths, self.counts, strict=True)]
        plan = plan_attention(self.starts(self.counts), prefixes, self.tables, BLOCK_SIZE_TOKENS, "cpu")
        return paged_attention(self.query, self.kv_layer, plan, scale, window)

    def exact(self, window: int | None, scale: float = 0.3) -> torch.Tensor:
        queries = self.query.split(self.counts)
        parts = zip(queries, self.keys, self.values, strict=True)
        return torch.cat([exact_attention(query, key, value, scale, window) for query, key, value in parts])


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([1], [1]),
        ([7, 8, 9, 1], [1, 1, 1, 1]),
        ([9], [9]),
        ([13, 12], [5, 4]),
        ([11, 6, 9, 14, 3], [1, 6, 1, 3, 1]),
        ([100, 3, 70], [1, 1, 1]),  # too different in length for one group
    ],
    ids=str,
)
def test_equals_the_definition(lengths: list[int], counts: list[int], num_kv_heads: int, window: int | None) -> None:
    batch = Batch(lengths, counts, num_kv_heads=num_kv_heads)
    torch.testing.assert_close(batch.ours(window).double(), batch.exact(window), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reads_a_cache_of_another_dtype_than_the_query(dtype: torch.dtype) -> None:
    batch = Batch([9, 6], [1, 3])
    batch.kv_layer = batch.kv_layer.to(dtype)
    batch.keys = [key.to(dtype) for key in batch.keys]
    batch.values = [value.to(dtype) for value in batch.values]
    output = batch.ours(None)
    assert output.dtype is torch.float32
    torch.testing.assert_close(output.double(), batch.exact(None), rtol=0, atol=2e-6)


def test_long_sequences_are_not_padded_onto_short_ones() -> None:
    starts, prefixes = [0, 1, 2, 3], [3, 399, 5]
    plan = plan_attention(starts, prefixes, [[1], list(range(2, 102)), [0, 1]], BLOCK_SIZE_TOKENS, "cpu")
    assert sorted(tuple(group.block_table_BN.shape) for group in plan.decode_groups) == [(1, 100), (2, 2)]


def test_slots_follow_the_block_table() -> None:
    plan = plan_attention([0, 3, 4], [2, 8], [[5, 7], [9, 1, 6, 99]], BLOCK_SIZE_TOKENS, "cpu")
    assert plan.slots_T.tolist() == [5 * 4 + 2, 5 * 4 + 3, 7 * 4, 6 * 4]


def test_a_block_table_that_ends_before_the_last_token_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 0 needs 2 blocks, its table has 1"):
        plan_attention([0, 1], [4], [[3]], BLOCK_SIZE_TOKENS, "cpu")


def test_a_sequence_without_query_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 0 query tokens"):
        plan_attention([0, 1, 1], [0, 3], [[3], [4]], BLOCK_SIZE_TOKENS, "cpu")


def test_a_block_outside_the_pool_is_an_error_not_a_wild_read() -> None:
    batch = Batch([5], [1])
    batch.tables = [[NUM_BLOCKS, 0]]
    with pytest.raises(IndexError):
        batch.ours(None)


def test_a_pool_whose_pages_are_not_contiguous_is_refused() -> None:
    batch = Batch([5], [1])
    batch.kv_layer = batch.kv_layer.transpose(3, 4).contiguous().transpose(3, 4)
    with pytest.raises(ValueError, match="contiguous pool"):
        batch.ours(None)


def test_copy_blocks_copies_whole_blocks_and_reads_before_it_writes() -> None:
    pool = torch.arange(4.0).view(4, 1, 1, 1, 1, 1).repeat(1, 2, 2, 1, 3, 5)
    copy_blocks(pool, pool, [(0, 1), (1, 2)])
    assert pool[:, 1, 1, 0, 2, 4].tolist() == [0.0, 0.0, 1.0, 3.0]
    host = torch.full((2, 2, 2, 1, 3, 5), 9.0)
    copy_blocks(pool, host, [(3, 0)])
    copy_blocks(pool, host, [])
    assert torch.equal(host[0], pool[3])
    assert bool((host[1] == 9.0).all())


def test_the_steps_of_a_chain_are_planned_as_one_by_one() -> None:
    first_positions, tables = [3, 9], [[7, 2], [1, 5, 4]]
    vectors = StepIntegers("cpu", *chain_vectors(first_positions, 2, tables, 4)).tensors
    chains = chains_of_vectors(vectors, 2, 4, first_key=1)
    for step in range(2):
        planned = plan_attention([0, 1, 2], [first + step for first in first_positions], tables, 4, "cpu", first_key=1)
        assert chains.step(step).slots_T.tolist() == planned.slots_T.tolist()
        assert chains.step(step).tables.prefix_lengths.tolist() == planned.tables.prefix_lengths.tolist()
        assert chains.step(step).first_key == planned.first_key
    with pytest.raises(ValueError, match="sequence 1 needs 4 blocks, its table has 3"):
        chain_vectors(first_positions, 4, tables, 4)
