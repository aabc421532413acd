"""Rows picked from a table by the native library."""

from __future__ import annotations

from typing import Final

import torch

from eagleray.kernels.native.arguments import require
from eagleray.kernels.native.library import ELEMENTS, NativeLibrary

_TABLE_ELEMENTS: Final = {**ELEMENTS, torch.float16: 2}  # with FLOAT16 of elementwise.c


def gather_rows(library: NativeLibrary, table: torch.Tensor, rows_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See ``api.gather_rows``; from float32, bfloat16 or float16 to one of the first two."""
    num_rows, size = table.shape
    require(table, (num_rows, size), table.dtype, "table")
    require(rows_T, (len(rows_T),), torch.int64, "rows_T")
    out = table.new_empty(len(rows_T), size, dtype=dtype)
    status = library.gather_rows(
        table.data_ptr(),
        _TABLE_ELEMENTS[table.dtype],
        num_rows,
        rows_T.data_ptr(),
        out.data_ptr(),
        ELEMENTS[dtype],
        len(rows_T),
        size,
    )
    if status != 0:
        raise IndexError(f"rows {rows_T.tolist()} are not all within the {num_rows} rows of the table")
    return out
