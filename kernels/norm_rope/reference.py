"""RMS norm and rotary embedding in plain torch, rounding where Hugging Face transformers rounds."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``api.rms_norm``."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def apply_rope(
    query: torch.Tensor, key: torch.Tensor, cos_T: torch.Tensor, sin_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``api.apply_rope``. Both are turned in one piece: on small batches the number of operations is the cost."""
    heads = torch.cat((query, key), dim=1)
    first, second = heads.chunk(2, dim=-1)
    rotated = heads * cos_T[:, None] + torch.cat((-second, first), dim=-1) * sin_T[:, None]
    turned_query, turned_key = torch.split(rotated, [query.shape[1], key.shape[1]], dim=1)
    return turned_query, turned_key
