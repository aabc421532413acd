"""Rows picked from a table, as a model picks its tokens' embeddings."""

from __future__ import annotations

import torch

from eagleray.kernels.embedding import reference


def gather_rows(table: torch.Tensor, rows_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``table`` [N, size] at ``rows_T``, int64 [T], in ``dtype``: [T, size]. Raises ``IndexError`` for a row that it
    lacks."""
    return reference.gather_rows(table, rows_T, dtype)
