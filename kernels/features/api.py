"""Features handed from token to token, within a step and from one step to the next."""

from __future__ import annotations

import torch

from eagleray.kernels.features import reference


def pass_features(
    features: torch.Tensor, sources_T: torch.Tensor, keeps_T: torch.Tensor, pool: torch.Tensor
) -> torch.Tensor:
    """The feature of the token before each, [T, size]; and ``pool`` [N, size] gets those that later steps ask for.

    Args:
        features: [T, size], of a step's tokens.
        sources_T: int64 [T]: the row of ``features`` for each, or ``~n`` for row n of the pool, as it was before.
        keeps_T: int64 [T]: the row of the pool that each feature goes to, or a negative number: none. No row twice.

    Raises:
        IndexError: there is no such row.
    """
    return reference.pass_features(features, sources_T, keeps_T, pool)
