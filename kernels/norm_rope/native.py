"""RMS norm and rotary embedding by the native library, in float32 or bfloat16."""

from __future__ import annotations

import torch

from eagleray.kernels.native.arguments import check_pool, new_rows, require, rows_of
from eagleray.kernels.native.library import ELEMENTS, NativeLibrary, address
from eagleray.kernels.norm_rope.head_norms import HeadNorms


def rms_norm(library: NativeLibrary, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``api.rms_norm``."""
    size = x.shape[-1]
    require(weight, (size,), x.dtype, "weight")
    rows = rows_of(x)
    out = new_rows(len(rows), size, x.dtype)
    library.rms_norm(
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        out.stride(0),
        len(rows),
        size,
        ELEMENTS[x.dtype],
        library.num_threads,
    )
    return out if x.ndim == 2 else out.reshape(x.shape)


def rotary_angles(
    library: NativeLibrary,
    positions_T: torch.Tensor,
    shift: int,
    frequencies: torch.Tensor,
    magnitude: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``api.rotary_angles``."""
    num_tokens, half = len(positions_T), len(frequencies)
    require(positions_T, (num_tokens,), torch.int64, "positions_T")
    require(frequencies, (half,), torch.float32, "frequencies")
    cos_T, sin_T = (frequencies.new_empty(num_tokens, 2 * half, dtype=dtype) for _ in range(2))
    library.rotary_angles(
        positions_T.data_ptr(),
        shift,
        frequencies.data_ptr(),
        magnitude,
        cos_T.data_ptr(),
        sin_T.data_ptr(),
        num_tokens,
        half,
        ELEMENTS[dtype],
    )
    return cos_T, sin_T


def rotate_and_store(
    library: NativeLibrary,
    heads: torch.Tensor,
    cos_T: torch.Tensor,
    sin_T: torch.Tensor,
    kv_layer: torch.Tensor,
    slots_T: torch.Tensor,
    norms: HeadNorms | None,
) -> torch.Tensor:
    """See ``api.rotate_and_store``. Raises ``IndexError`` for a slot outside the pool."""
    check_pool(kv_layer)
    if heads.stride()[1:] != (heads.shape[2], 1):
        heads = heads.contiguous()
    num_blocks, _, num_kv_heads, block_size, head_dim = kv_layer.shape
    num_tokens, num_all_heads, _ = heads.shape
    num_heads = num_all_heads - 2 * num_kv_heads
    require(cos_T, (num_tokens, head_dim), heads.dtype, "cos_T")
    require(sin_T, (num_tokens, head_dim), heads.dtype, "sin_T")
    require(slots_T, (num_tokens,), torch.int64, "slots_T")
    if norms is not None:
        require(norms.query_weight, (head_dim,), heads.dtype, "query_weight")
        require(norms.key_weight, (head_dim,), heads.dtype, "key_weight")
    status = library.rotate_and_store(
        heads.data_ptr(),
        heads.stride(0),
        address(norms.query_weight if norms else None),
        address(norms.key_weight if norms else None),
        norms.eps if norms else 0.0,
        cos_T.data_ptr(),
        sin_T.data_ptr(),
        slots_T.data_ptr(),
        kv_layer.data_ptr(),
        num_blocks,
        kv_layer.stride(0),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        ELEMENTS[heads.dtype],
        ELEMENTS[kv_layer.dtype],
        library.num_threads,
    )
    if status != 0:
        raise IndexError(f"a slot lies outside the pool of {num_blocks} blocks")
    return heads[:, :num_heads]
