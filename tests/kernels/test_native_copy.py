from __future__ import annotations

import pytest
import torch

from eagleray.kernels.kv_ops import native, reference
from eagleray.kernels.native.library import NativeLibrary


def pool(num_blocks: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_blocks, 3, 2, 2, 16, 8, generator=torch.Generator().manual_seed(num_blocks)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", [[], [(3, 0)], [(0, 4), (6, 2), (6, 1), (2, 8)], [(n, 99 - n) for n in range(40)]])
def test_blocks_go_where_the_reference_puts_them(
    library: NativeLibrary, dtype: torch.dtype, pairs: list[tuple[int, int]]
) -> None:
    source, target = pool(50, dtype), pool(100, dtype)
    expected = target.clone()
    reference.copy_blocks(source, expected, pairs)
    native.copy_blocks(library, source, target, pairs)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 2), (2, 0)], [(0, 3), (1, 4)]])
def test_within_a_pool_all_blocks_are_read_before_any_is_written(
    library: NativeLibrary, pairs: list[tuple[int, int]]
) -> None:
    blocks = pool(5)
    expected = blocks.clone()
    reference.copy_blocks(expected, expected, pairs)
    native.copy_blocks(library, blocks, blocks, pairs)
    assert torch.equal(blocks, expected)


@pytest.mark.parametrize("pair", [(5, 0), (-1, 0), (0, 5), (0, -1)])
def test_a_block_outside_its_pool_is_refused(library: NativeLibrary, pair: tuple[int, int]) -> None:
    with pytest.raises(IndexError, match="outside the pool of 5 blocks"):
        native.copy_blocks(library, pool(5), pool(5), [pair])


def test_pools_of_other_blocks_are_refused(library: NativeLibrary) -> None:
    with pytest.raises(ValueError, match="differ"):
        native.copy_blocks(library, pool(5), pool(5, torch.bfloat16), [(0, 0)])
