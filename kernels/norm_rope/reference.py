"""RMS norm and rotary embedding in plain torch, rounding where Hugging Face transformers rounds."""

from __future__ import annotations

import torch

from eagleray.kernels.kv_ops.reference import write_kv
from eagleray.kernels.norm_rope.head_norms import HeadNorms


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``api.rms_norm``."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def rotary_angles(
    positions_T: torch.Tensor, shift: int, frequencies: torch.Tensor, magnitude: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``api.rotary_angles``."""
    angles = (positions_T + shift)[:, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)


def apply_rope(
    query: torch.Tensor, key: torch.Tensor, cos_T: torch.Tensor, sin_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``api.apply_rope``. Both are turned in one piece: on small batches the number of operations is the cost."""
    heads = torch.cat((query, key), dim=1)
    first, second = heads.chunk(2, dim=-1)
    rotated = heads * cos_T[:, None] + torch.cat((-second, first), dim=-1) * sin_T[:, None]
    turned_query, turned_key = torch.split(rotated, [query.shape[1], key.shape[1]], dim=1)
    return turned_query, turned_key


def rotate_and_store(
    heads: torch.Tensor,
    cos_T: torch.Tensor,
    sin_T: torch.Tensor,
    kv_layer: torch.Tensor,
    slots_T: torch.Tensor,
    norms: HeadNorms | None,
) -> torch.Tensor:
    """See ``api.rotate_and_store``."""
    num_kv_heads = kv_layer.shape[2]
    query, key, value = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        query, key = rms_norm(query, norms.query_weight, norms.eps), rms_norm(key, norms.key_weight, norms.eps)
    query, key = apply_rope(query, key, cos_T, sin_T)
    write_kv(kv_layer, key, value, slots_T)
    return query
