"""Attention over paged KV. Plan once per step (``plan_attention``), run once per layer (``paged_attention``)."""

from __future__ import annotations

import torch

from eagleray.kernels.paged_attention import reference
from eagleray.kernels.paged_attention.plan import (
    AttentionPlan,
    attention_vectors,
    chain_vectors,
    chains_of_vectors,
    plan_attention,
    plan_of_vectors,
)
from eagleray.kernels.paged_attention.tree import TreeRun, tree_run

__all__ = [
    "AttentionPlan",
    "TreeRun",
    "attention_vectors",
    "chain_vectors",
    "chains_of_vectors",
    "paged_attention",
    "plan_attention",
    "plan_of_vectors",
    "tree_run",
]


def paged_attention(
    query: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """Causal attention of the step's tokens to everything before them in their own sequence, and themselves.

    Tokens of a tree see its prefix, their ancestors and themselves instead (``tree.tree_run``).

    Keys and values come from the cache alone, also those of the step's own tokens: write them first
    (``kv_ops.api.write_kv``). So it makes no difference how a sequence was cut into steps.

    Args:
        query: [T, H, D], rows as in the plan.
        kv_layer: [num_blocks, 2, HKV, block_size, D], one layer of the pool; H is a multiple of HKV, and query head h
            reads KV head ``h // (H // HKV)``. Another dtype than the query's is converted on reading.
        plan: from ``plan_attention``, with this pool's block size.
        scale: factor on the scores, usually ``D ** -0.5``.
        sliding_window: each token sees itself and the ``sliding_window - 1`` tokens before it; None: all.

    Returns:
        [T, H, D] in the query's dtype.
    """
    return reference.paged_attention(query, kv_layer, plan, scale, sliding_window)
