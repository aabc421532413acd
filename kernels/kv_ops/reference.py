"""Writing and copying KV blocks in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def write_kv(kv_layer: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots_T: torch.Tensor) -> None:
    """See ``api.write_kv``."""
    block_size_tokens = kv_layer.shape[3]
    blocks_T, offsets_T = slots_T // block_size_tokens, slots_T % block_size_tokens
    kv_layer[blocks_T, :, :, offsets_T] = torch.stack((key, value), dim=1).to(kv_layer.dtype)  # [T, 2, HKV, D]


def copy_blocks(source_pool: torch.Tensor, target_pool: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """See ``api.copy_blocks``."""
    if not pairs:
        return
    sources, targets = zip(*pairs, strict=True)
    blocks = source_pool[torch.tensor(sources, device=source_pool.device)]
    target_pool[torch.tensor(targets, device=target_pool.device)] = blocks.to(target_pool.device)


def copy_tokens(pool: torch.Tensor, sources_N: torch.Tensor, targets_N: torch.Tensor) -> None:
    """See ``api.copy_tokens``."""
    size = pool.shape[4]
    tokens = pool[sources_N // size, :, :, :, sources_N % size]  # [N, L, 2, HKV, D]
    pool[targets_N // size, :, :, :, targets_N % size] = tokens
