"""What stands between two linear layers, by the native library."""

from __future__ import annotations

import torch

from eagleray.kernels.native.library import ELEMENTS, NativeLibrary


def silu_and_multiply(library: NativeLibrary, gate_up: torch.Tensor) -> torch.Tensor:
    """See ``api.silu_and_multiply``; float32 or bfloat16."""
    gate_up = gate_up.contiguous()
    num_tokens, twice_size = gate_up.shape
    out = gate_up.new_empty(num_tokens, twice_size // 2)
    library.silu_and_multiply(
        gate_up.data_ptr(),
        out.data_ptr(),
        num_tokens,
        twice_size // 2,
        ELEMENTS[gate_up.dtype],
        library.num_threads,
    )
    return out


def join_columns(library: NativeLibrary, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """See ``api.join_columns``."""
    if left.dtype is not right.dtype or len(left) != len(right):
        raise ValueError(f"cannot join {left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}")
    left, right = left.contiguous(), right.contiguous()
    out = left.new_empty(len(left), left.shape[1] + right.shape[1])
    left_bytes, right_bytes = (tensor.shape[1] * tensor.element_size() for tensor in (left, right))
    library.join_columns(left.data_ptr(), left_bytes, right.data_ptr(), right_bytes, out.data_ptr(), len(left))
    return out
