"""Copying KV blocks by the native library."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eagleray.kernels.kv_ops import reference
from eagleray.kernels.native.library import NativeLibrary


def copy_blocks(
    library: NativeLibrary, source_pool: torch.Tensor, target_pool: torch.Tensor, pairs: Sequence[tuple[int, int]]
) -> None:
    """See ``api.copy_blocks``; both pools in host memory. Raises ``IndexError`` for a block outside its pool."""
    if not pairs:
        return
    if source_pool.shape[1:] != target_pool.shape[1:] or source_pool.dtype is not target_pool.dtype:
        raise ValueError(
            f"blocks {source_pool.dtype} {list(source_pool.shape[1:])} and {target_pool.dtype} "
            f"{list(target_pool.shape[1:])} differ; pools may differ in their number of blocks alone"
        )
    sources, targets = torch.tensor(pairs, dtype=torch.int64).T.contiguous()
    _check_blocks(sources, source_pool, "source")
    _check_blocks(targets, target_pool, "target")
    if source_pool.data_ptr() == target_pool.data_ptr() and torch.isin(sources, targets).any():
        reference.copy_blocks(source_pool, target_pool, pairs)  # what is read later must be set aside first
        return
    library.copy_blocks(
        source_pool.data_ptr(),
        target_pool.data_ptr(),
        sources.data_ptr(),
        targets.data_ptr(),
        len(pairs),
        source_pool[0].nbytes,
        library.num_threads,
    )


def _check_blocks(block_ids: torch.Tensor, pool: torch.Tensor, name: str) -> None:
    if not pool.is_contiguous():
        raise ValueError(f"the {name} pool has strides {pool.stride()}; it must be contiguous")
    if block_ids.min() < 0 or block_ids.max() >= len(pool):
        raise IndexError(f"a {name} block of {block_ids.tolist()} lies outside the pool of {len(pool)} blocks")
