"""Paged attention in plain torch: the specification, the oracle of other implementations, and the CPU path.

Suffixes name dimensions: T query tokens, B sequences, N blocks, S key slots.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from eagleray.kernels.paged_attention.plan import AttentionPlan, DecodeGroup, QueryRun


def paged_attention(
    query: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """See ``api.paged_attention``."""
    if len(plan.decode_groups) == 1 and not plan.runs:
        return _decode(query, kv_layer, plan.decode_groups[0], scale, sliding_window)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for group in plan.decode_groups:
        output[group.rows_B] = _decode(query[group.rows_B], kv_layer, group, scale, sliding_window)
    for run in plan.runs:
        rows = slice(run.row_start, run.row_end)
        output[rows] = _attend_run(query[rows], kv_layer, run, scale, sliding_window, plan.first_key)
    return output


def _decode(
    query: torch.Tensor, kv_layer: torch.Tensor, group: DecodeGroup, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """One query token per sequence: [B, H, D] -> [B, H, D]. The query heads that share a KV head become its query
    rows: SDPA's own grouping is ten times slower at query length 1."""
    num_sequences, num_heads, head_dim = query.shape
    pages = _gather(kv_layer, group.block_table_BN)
    # A masked slot still enters as 0 * value and key + -inf: whatever an earlier owner left there must be finite.
    sequences, slots = group.padding
    pages[sequences, :, :, slots] = 0
    key, value = pages.to(query.dtype).unbind(1)  # [B, HKV, S, D]
    is_visible_BS = group.is_real_BS
    if sliding_window is not None:
        positions_S = torch.arange(is_visible_BS.shape[1], device=query.device)
        is_visible_BS = is_visible_BS & (positions_S >= group.lengths_B1 - sliding_window)
    output = scaled_dot_product_attention(
        query.reshape(num_sequences, key.shape[1], -1, head_dim),
        key,
        value,
        attn_mask=is_visible_BS[:, None, None, :],
        scale=scale,
    )
    return output.reshape(num_sequences, num_heads, head_dim)


def _attend_run(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    run: QueryRun,
    scale: float,
    sliding_window: int | None,
    first_key: int,
) -> torch.Tensor:
    """Several tokens of one sequence: [T, H, D] -> [T, H, D]."""
    num_tokens, num_heads, head_dim = query.shape
    pages = _gather(kv_layer, run.block_table_N[None])[0, :, :, : run.length]
    key, value = pages.to(query.dtype).unbind(0)  # [HKV, S, D]
    group_size = num_heads // key.shape[0]
    is_plain_causal = run.prefix_length == 0 and sliding_window is None and run.tree is None and first_key == 0
    output = scaled_dot_product_attention(
        query.view(num_tokens, -1, group_size, head_dim).permute(1, 2, 0, 3),  # [HKV, G, T, D]
        key[:, None].expand(-1, group_size, -1, -1),
        value[:, None].expand(-1, group_size, -1, -1),
        attn_mask=None if is_plain_causal else _visible_keys(run, sliding_window, first_key, query.device),
        is_causal=is_plain_causal,
        scale=scale,
    )
    return output.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _visible_keys(run: QueryRun, sliding_window: int | None, first_key: int, device: torch.device) -> torch.Tensor:
    """[T, S] bool: which keys each query token of the run sees. A window counts the token itself."""
    key_positions = torch.arange(run.length, device=device)
    is_visible = key_positions <= key_positions[run.prefix_length :, None]
    if run.tree is not None:
        tokens = range(len(run.tree.masks))
        is_visible[:, run.prefix_length :] = torch.tensor(
            [[bool(mask >> token & 1) for token in tokens] for mask in run.tree.masks], device=device
        )
        key_positions[run.prefix_length :] = run.prefix_length + torch.tensor(run.tree.depths, device=device)
    if sliding_window is not None:
        is_visible &= key_positions > key_positions[run.prefix_length :, None] - sliding_window
    is_visible[:, :first_key] = False
    return is_visible


def _gather(kv_layer: torch.Tensor, block_table_BN: torch.Tensor) -> torch.Tensor:
    """Copy the blocks of a table together: [B, 2, HKV, N * block_size, D].

    The pool is seen as rows of one head's page each, so that pages land in their final order by plain memory copies.
    """
    num_blocks, two, num_kv_heads, block_size, head_dim = kv_layer.shape
    page, pages_per_block = block_size * head_dim, two * num_kv_heads
    if kv_layer.stride()[1:] != (num_kv_heads * page, page, head_dim, 1) or kv_layer.stride(0) % page:
        raise ValueError(f"kv_layer must be one layer of a contiguous pool, not strides {kv_layer.stride()}")
    row_step = kv_layer.stride(0) // page
    rows = kv_layer.as_strided(((num_blocks - 1) * row_step + pages_per_block, page), (page, 1))
    num_sequences, num_pages = block_table_BN.shape
    page_index = torch.arange(pages_per_block, device=kv_layer.device)[:, None]
    row_ids = block_table_BN[:, None] * row_step + page_index  # [B, 2 * HKV, N]
    gathered = rows.index_select(0, row_ids.view(-1))
    return gathered.view(num_sequences, two, num_kv_heads, num_pages * block_size, head_dim)
