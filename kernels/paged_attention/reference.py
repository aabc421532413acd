"""Paged attention in plain torch: the specification, the oracle of other implementations, and the CPU path.

Suffixes name dimensions: T query tokens, B sequences, N blocks, S key slots.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from eagleray.kernels.paged_attention.pieces import PIECE_KEYS, PIECE_PAIRS
from eagleray.kernels.paged_attention.plan import AttentionPlan, QueryRun


def paged_attention(
    query: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """See ``api.paged_attention``. What is gathered and masked at one time is bounded (``pieces``)."""
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    num_kv_heads = kv_layer.shape[2]
    group_size = query.shape[1] // num_kv_heads
    for group in plan.decode_groups:
        slots_S = torch.arange(group.num_slots, device=query.device)
        is_real_BS = (slots_S < group.lengths_B1) & (slots_S >= plan.first_key)
        padding = torch.nonzero(~is_real_BS, as_tuple=True)
        is_visible_BS = is_real_BS
        if sliding_window is not None:
            is_visible_BS &= slots_S >= group.lengths_B1 - sliding_window
        for kv_heads in _pieces(num_kv_heads, PIECE_KEYS // is_visible_BS.numel()):
            at = (group.rows_B, slice(kv_heads.start * group_size, kv_heads.stop * group_size))
            output[at] = _decode(query[at], kv_layer, kv_heads, group.block_table_BN, padding, is_visible_BS, scale)
    for run in plan.runs:
        is_plain = run.prefix_length == 0 and sliding_window is None and run.tree is None and plan.first_key == 0
        num_tokens = run.row_end - run.row_start
        for rows in _pieces(num_tokens, num_tokens if is_plain else PIECE_PAIRS // run.length):
            is_visible_TS = None if is_plain else _visible_keys(run, rows, sliding_window, plan.first_key, query.device)
            for kv_heads in _pieces(num_kv_heads, PIECE_KEYS // run.length):
                heads = slice(kv_heads.start * group_size, kv_heads.stop * group_size)
                at_rows = slice(run.row_start + rows.start, run.row_start + rows.stop)
                attended = _attend_run(query[at_rows, heads], kv_layer, kv_heads, run, is_visible_TS, scale)
                output[at_rows, heads] = attended
    return output


def _pieces(number: int, at_most: int) -> list[range]:
    """``range(number)`` in pieces of at most so many, but of one at least."""
    size = max(1, at_most)
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def _decode(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    kv_heads: range,
    block_table_BN: torch.Tensor,
    padding: tuple[torch.Tensor, ...],  # int64 pair (sequence, slot) of all slots that hold no key that counts
    is_visible_BS: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One query token per sequence: [B, H, D] -> [B, H, D]. The query heads that share a KV head become its query
    rows: SDPA's own grouping is ten times slower at query length 1."""
    num_sequences, num_heads, head_dim = query.shape
    pages = _gather(kv_layer, kv_heads, block_table_BN)
    # A masked slot still enters as 0 * value and key + -inf: whatever an earlier owner left there must be finite.
    sequences, slots = padding
    pages[sequences, :, :, slots] = 0
    key, value = pages.to(query.dtype).unbind(1)  # [B, HKV, S, D]
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
    is_visible_TS: torch.Tensor | None,  # None: of the whole run, each token sees those before it
    scale: float,
) -> torch.Tensor:
    """Several tokens of one sequence: [T, H, D] -> [T, H, D]."""
    num_tokens, num_heads, head_dim = query.shape
    pages = _gather(kv_layer, kv_heads, run.block_table_N[None])[0, :, :, : run.length]
    key, value = pages.to(query.dtype)[:, :, None].expand(-1, -1, num_heads // len(kv_heads), -1, -1).unbind(0)
    output = scaled_dot_product_attention(
        query.view(num_tokens, len(kv_heads), -1, head_dim).permute(1, 2, 0, 3),  # [HKV, G, T, D]
        key,
        value,
        attn_mask=is_visible_TS,
        is_causal=is_visible_TS is None,
        scale=scale,
    )
    return output.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


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
