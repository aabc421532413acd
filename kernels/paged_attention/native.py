"""Paged attention by the native library, in float32 or bfloat16: the same bits for a token however it was batched."""

from __future__ import annotations

import torch

from eagleray.kernels.native.arguments import check_pool, new_rows
from eagleray.kernels.native.library import ELEMENTS, MAX_HEAD_DIM, NativeLibrary, address
from eagleray.kernels.paged_attention.plan import AttentionPlan


def paged_attention(
    library: NativeLibrary,
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """See ``api.paged_attention``. Raises ``IndexError`` for a block outside the pool."""
    check_pool(kv_layer)
    num_blocks, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    _, num_heads, _ = query.shape
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}; the native kernel takes up to {MAX_HEAD_DIM}")
    if plan.block_size_tokens != block_size or plan.slots_T.shape[0] != query.shape[0]:
        batch = f"{len(plan.slots_T)} tokens in blocks of {plan.block_size_tokens}"
        raise ValueError(f"the plan is for {batch}; there are {len(query)} in blocks of {block_size}")
    if query.stride(2) != 1:
        query = query.contiguous()
    out = new_rows(len(query), num_heads * head_dim, query.dtype).view(query.shape)
    tables = plan.tables
    status = library.paged_attention(
        *(query.data_ptr(), query.stride(0), query.stride(1)),
        kv_layer.data_ptr(),
        num_blocks,
        kv_layer.stride(0),
        out.data_ptr(),
        out.stride(0),
        tables.prefix_lengths.shape[0],
        tables.query_starts.data_ptr(),
        tables.prefix_lengths.data_ptr(),
        tables.table_starts.data_ptr(),
        tables.block_ids.data_ptr(),
        address(tables.tree_masks),
        address(tables.tree_depths),
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        sliding_window or 0,
        plan.first_key,
        scale,
        ELEMENTS[query.dtype],
        ELEMENTS[kv_layer.dtype],
        library.num_threads,
    )
    if status != 0:
        raise IndexError(f"a block table names a block outside the pool of {num_blocks} blocks")
    return out
