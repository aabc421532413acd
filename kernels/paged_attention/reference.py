"""Paged attention in plain torch: the specification, the oracle of other implementations, and the CPU path.

Suffixes name dimensions: T query tokens, B sequences, N blocks, S key slots.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from eagleray.kernels.paged_attention.pieces import PIECE_KEYS, PIECE_PAIRS
from eagleray.kernels.paged_attention.plan import AttentionPlan, DecodeGroup, QueryRun


def paged_attention(
    query: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """See ``api.paged_attention``. What is gathered and masked at one time is bounded (``pieces``)."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    group_size = query.shape[1] // kv_layer.shape[2]
    for group in plan.decode_groups:
        query_BHD = query[group.rows_B]
        for kv_heads in _pieces(kv_layer.shape[2], PIECE_KEYS // (group.num_slots * len(group.rows_B))):
            heads = slice(kv_heads.start * group_size, kv_heads.stop * group_size)
            attended = _decode(query_BHD[:, heads], kv_layer, kv_heads, group, scale, sliding_window)
            output[group.rows_B, heads] = attended
    for run in plan.runs:
        for kv_heads in _pieces(kv_layer.shape[2], PIECE_KEYS // run.length):
            heads = slice(kv_heads.start * group_size, kv_heads.stop * group_size)
            rows = slice(run.row_start, run.row_end)
            output[rows, heads] = _attend_run(
                query[rows, heads], kv_layer, kv_heads, run, scale, sliding_window, plan.first_key
            )
    return output


def _pieces(number: int, at_most: int) -> list[range]:
    """``range(number)`` in pieces of at most so many, but of one at least."""
    size = max(1, at_most)
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def _decode(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    kv_heads: range,
    group: DecodeGroup,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """One query token per sequence: [B, H, D] -> [B, H, D]. The query heads that share a KV head become its query
    rows: SDPA's own grouping is ten times slower at query length 1."""
    num_sequences, num_heads, head_dim = query.shape
    pages = _gather(kv_layer, kv_heads, group.block_table_BN)
    slots_S = torch.arange(group.num_slots, device=query.device)
    is_visible_BS = (slots_S < group.lengths_B1) & (slots_S >= group.first_key)
    # A masked slot still enters as 0 * value and key + -inf: whatever an earlier owner left there must be finite.
    sequences, slots = torch.nonzero(~is_visible_BS, as_tuple=True)
    pages[sequences, :, :, slots] = 0
    key, value = pages.to(query.dtype).unbind(1)  # [B, HKV, S, D]
    if sliding_window is not None:
        is_visible_BS &= slots_S >= group.lengths_B1 - sliding_window
    output = scaled_dot_product_attention(
        query.reshape(num_sequences, len(kv_heads), -1, head_dim),
        key,
        value,
        attn_mask=is_visible_BS[:, None, None, :],
        scale=scale,
    )
    return output.reshape(num_sequences, num_heads, head_dim)


def _attend_run(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    kv_heads: range,
    run: QueryRun,
    scale: float,
    sliding_window: int | None,
    first_key: int,
) -> torch.Tensor:
    """Several tokens of one sequence: [T, H, D] -> [T, H, D]."""
    num_tokens, num_heads, head_dim = query.shape
    pages = _gather(kv_layer, kv_heads, run.block_table_N[None])[0, :, :, : run.length]
    key, value = pages.to(query.dtype)[:, :, None].expand(-1, -1, num_heads // len(kv_heads), -1, -1).unbind(0)
    query = query.view(num_tokens, len(kv_heads), -1, head_dim).permute(1, 2, 0, 3)  # [HKV, G, T, D]
    if run.prefix_length == 0 and sliding_window is None and run.tree is None and first_key == 0:
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return output.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
    outputs = [
        scaled_dot_product_attention(
            query[:, :, rows.start : rows.stop],
            key,
            value,
            attn_mask=_visible_keys(run, rows, sliding_window, first_key, query.device),
            scale=scale,
        )
        for rows in _pieces(num_tokens, PIECE_PAIRS // run.length)
    ]
    return torch.cat(outputs, dim=2).permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _visible_keys(
    run: QueryRun, rows: range, sliding_window: int | None, first_key: int, device: torch.device
) -> torch.Tensor:
    """[T, S] bool: which keys each of these query tokens of the run sees. A window counts the token itself."""
    key_positions = torch.arange(run.length, device=device)
    query_positions = key_positions[run.prefix_length :]
    is_visible = key_positions <= query_positions[rows.start : rows.stop, None]
    if run.tree is not None:
        tokens = range(len(run.tree.masks))
        is_visible[:, run.prefix_length :] = torch.tensor(
            [[bool(run.tree.masks[row] >> token & 1) for token in tokens] for row in rows], device=device
        )
        query_positions.copy_(run.prefix_length + torch.tensor(run.tree.depths, device=device))
    if sliding_window is not None:
        is_visible &= key_positions > query_positions[rows.start : rows.stop, None] - sliding_window
    is_visible[:, :first_key] = False
    return is_visible


def _gather(kv_layer: torch.Tensor, kv_heads: range, block_table_BN: torch.Tensor) -> torch.Tensor:
    """Copy some heads of the blocks of a table together: [B, 2, HKV, N * block_size, D].

    The pool is seen as rows of one head's page each, so that pages land in their final order by plain memory copies.
    """
    num_blocks, two, num_kv_heads, block_size, head_dim = kv_layer.shape
    page, pages_per_block = block_size * head_dim, two * num_kv_heads
    if kv_layer.stride()[1:] != (num_kv_heads * page, page, head_dim, 1) or kv_layer.stride(0) % page:
        raise ValueError(f"kv_layer must be one layer of a contiguous pool, not strides {kv_layer.stride()}")
    row_step = kv_layer.stride(0) // page
    rows = kv_layer.as_strided(((num_blocks - 1) * row_step + pages_per_block, page), (page, 1))
    num_sequences, num_pages = block_table_BN.shape
    heads = torch.arange(kv_heads.start, kv_heads.stop, device=kv_layer.device)
    page_index = torch.cat((heads, num_kv_heads + heads))[:, None]  # keys, then values
    row_ids = block_table_BN[:, None] * row_step + page_index  # [B, 2 * HKV, N]
    gathered = rows.index_select(0, row_ids.view(-1))
    return gathered.view(num_sequences, two, len(kv_heads), num_pages * block_size, head_dim)
