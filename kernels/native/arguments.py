"""What the native kernels ask of tensors: they get addresses, so that a wrong shape would be a wild read."""

from __future__ import annotations

from typing import Final

import torch

_CACHE_LINE_BYTES: Final = 64
_ALIKE_BYTES: Final = 1024  # rows so many bytes apart, or a multiple, share a few sets of the first cache
_FEW_ROWS: Final = 128  # fit into these all the same


def new_rows(num_rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised [num_rows, size], each row contiguous. Where rows would evict each other from the caches when a few
    columns of each are read or written, as products do, they lie one cache line further apart."""
    gap = _CACHE_LINE_BYTES // dtype.itemsize
    if num_rows <= _FEW_ROWS or size * dtype.itemsize % _ALIKE_BYTES:
        return torch.empty(num_rows, size, dtype=dtype)
    return torch.empty(num_rows, size + gap, dtype=dtype)[:, :size]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., size] as [rows, size] with each row contiguous; copied only if it must be."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def require(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    """Raises ``ValueError`` unless ``tensor`` is contiguous, of that shape and dtype."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"{name} is {found}; it must be {dtype} {list(shape)}, contiguous")


def check_pool(kv_layer: torch.Tensor) -> None:
    """Raises ``ValueError`` unless ``kv_layer`` [num_blocks, 2, HKV, block_size, D] is a layer of a contiguous pool."""
    _, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    page = block_size * head_dim
    if kv_layer.stride()[1:] != (num_kv_heads * page, page, head_dim, 1):
        raise ValueError(f"kv_layer must be one layer of a contiguous pool, not strides {kv_layer.stride()}")
