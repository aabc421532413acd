"""Writing KV into the pool, and copying whole blocks between pools."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eagleray.kernels.kv_ops import reference


def write_kv(kv_layer: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Store the keys and values of new tokens, converted to the pool's dtype.

    Args:
        kv_layer: [num_blocks, 2, HKV, block_size, D], one layer of the pool; written in place.
        key, value: [T, HKV, D].
        slots_T: int64 [T], ``block_id * block_size + offset`` of each token; no slot twice.
    """
    reference.write_kv(kv_layer, key, value, slots_T)


def copy_blocks(source_pool: torch.Tensor, target_pool: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks, ``(source, target)`` each, between pools [num_blocks, L, 2, HKV, block_size, D] that differ at
    most in device and number of blocks. All sources are read before any target is written; no target twice."""
    reference.copy_blocks(source_pool, target_pool, pairs)


def copy_tokens(pool: torch.Tensor, sources_N: torch.Tensor, targets_N: torch.Tensor) -> None:
    """Copy the KV of single tokens, all layers of it, within a pool [num_blocks, L, 2, HKV, block_size, D].

    Slots are int64 [N], ``block_id * block_size + offset``. All sources are read before any target is written; no
    target twice.
    """
    reference.copy_tokens(pool, sources_N, targets_N)
