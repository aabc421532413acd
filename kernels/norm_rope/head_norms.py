"""What models may do to queries and keys before the rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms over head_dim."""

    query_weight: torch.Tensor  # [D]
    key_weight: torch.Tensor  # [D]
    eps: float
