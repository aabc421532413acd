"""What stands between two linear layers, in plain torch."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """See ``api.silu_and_multiply``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def join_columns(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """See ``api.join_columns``."""
    return torch.cat((left, right), dim=-1)
