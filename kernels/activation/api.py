"""What stands between two linear layers."""

from __future__ import annotations

import torch

from eagleray.kernels.activation import reference


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` for ``gate_up`` [T, 2 * size], the gate first: [T, size] (Shazeer, arXiv 2002.05202)."""
    return reference.silu_and_multiply(gate_up)


def join_columns(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[T, A] and [T, B] of one dtype, side by side: [T, A + B]."""
    return reference.join_columns(left, right)
