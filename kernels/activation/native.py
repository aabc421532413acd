"""What stands between two linear layers, by the native library."""

from __future__ import annotations

import torch

from eagleray.kernels.native.arguments import new_rows, rows_of
from eagleray.kernels.native.library import ELEMENTS, NativeLibrary


def silu_and_multiply(library: NativeLibrary, gate_up: torch.Tensor) -> torch.Tensor:
    """See ``api.silu_and_multiply``; float32 or bfloat16."""
    gate_up = rows_of(gate_up)
    num_tokens, twice_size = gate_up.shape
    out = new_rows(num_tokens, twice_size // 2, gate_up.dtype)
    library.silu_and_multiply(
        gate_up.data_ptr(),
        gate_up.stride(0),
        out.data_ptr(),
        out.stride(0),
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
    left, right = rows_of(left), rows_of(right)
    out = left.new_empty(len(left), left.shape[1] + right.shape[1])
    sides = [
        (side.data_ptr(), side.shape[1] * side.element_size(), side.stride(0) * side.element_size())
        for side in (left, right)
    ]
    library.join_columns(*sides[0], *sides[1], out.data_ptr(), len(left))
    return out
