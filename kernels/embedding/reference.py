"""Rows picked from a table, in plain torch."""

from __future__ import annotations

import torch
from torch.nn.functional import embedding


def gather_rows(table: torch.Tensor, rows_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See ``api.gather_rows``."""
    return embedding(rows_T, table).to(dtype)
