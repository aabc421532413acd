"""Features handed from token to token, by the native library."""

from __future__ import annotations

import torch

from eagleray.kernels.native.arguments import require
from eagleray.kernels.native.library import ELEMENTS, NativeLibrary


def pass_features(
    library: NativeLibrary,
    features: torch.Tensor,
    sources_T: torch.Tensor,
    keeps_T: torch.Tensor,
    pool: torch.Tensor,
) -> torch.Tensor:
    """See ``api.pass_features``, in float32 or bfloat16."""
    num_rows, size = features.shape
    features = features.contiguous()  # rows of a large step lie apart
    require(sources_T, (num_rows,), torch.int64, "sources_T")
    require(keeps_T, (num_rows,), torch.int64, "keeps_T")
    require(pool, (len(pool), size), pool.dtype, "pool")
    previous = features.new_empty(features.shape)
    status = library.pass_features(
        features.data_ptr(),
        sources_T.data_ptr(),
        keeps_T.data_ptr(),
        pool.data_ptr(),
        ELEMENTS[pool.dtype],
        len(pool),
        previous.data_ptr(),
        num_rows,
        size,
        ELEMENTS[features.dtype],
    )
    if status != 0:
        raise IndexError(f"a row lies outside the {num_rows} features or the {len(pool)} rows of the pool")
    return previous
