"""Features handed from token to token, in plain torch."""

from __future__ import annotations

import torch


def pass_features(
    features: torch.Tensor, sources_T: torch.Tensor, keeps_T: torch.Tensor, pool: torch.Tensor
) -> torch.Tensor:
    """See ``api.pass_features``."""
    is_own_T1 = (sources_T >= 0)[:, None]
    earlier = pool[(~sources_T).clamp(min=0)].to(features.dtype)
    previous = torch.where(is_own_T1, features[sources_T.clamp(min=0)], earlier)
    is_kept_T = keeps_T >= 0
    pool[keeps_T[is_kept_T]] = features[is_kept_T].to(pool.dtype)
    return previous
