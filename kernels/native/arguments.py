"""What the native kernels ask of tensors: they get addresses, so that a wrong shape would be a wild read."""

from __future__ import annotations

import torch


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
