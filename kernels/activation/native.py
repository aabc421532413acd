"""The gate of the MLP by the native library."""

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
