"""RMS norm and rotary position embedding."""

from __future__ import annotations

import torch

from eagleray.kernels.norm_rope import reference
from eagleray.kernels.norm_rope.head_norms import HeadNorms


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Computed in float32, rounded to the dtype of ``x``, then multiplied by ``weight`` [x.shape[-1]].
    """
    return reference.rms_norm(x, weight, eps)


def rotary_angles(
    positions_T: torch.Tensor, shift: int, frequencies: torch.Tensor, magnitude: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of ``positions_T + shift``, int64 [T], times ``frequencies``, float32 [D / 2] radians.

    [T, D] each, both halves alike; computed in float32, multiplied by ``magnitude``, then rounded to ``dtype``.
    """
    return reference.rotary_angles(positions_T, shift, frequencies, magnitude, dtype)


def apply_rope(
    query: torch.Tensor, key: torch.Tensor, cos_T: torch.Tensor, sin_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query [T, H, D] and key [T, HKV, D] by their positions (Su et al., arXiv 2104.09864).

    Dimension i turns together with i + D / 2, the layout of Hugging Face checkpoints. ``cos_T`` and ``sin_T`` are
    [T, D], both halves alike, in the dtype of the query.
    """
    return reference.apply_rope(query, key, cos_T, sin_T)


def rotate_and_store(
    heads: torch.Tensor,
    cos_T: torch.Tensor,
    sin_T: torch.Tensor,
    kv_layer: torch.Tensor,
    slots_T: torch.Tensor,
    norms: HeadNorms | None,
) -> torch.Tensor:
    """From the fused projection to attention's input: norm and rotate queries and keys, write keys and values.

    Args:
        heads: [T, H + 2 * HKV, D], queries, keys, values; may be overwritten.
        cos_T, sin_T: as in ``apply_rope``.
        kv_layer: [num_blocks, 2, HKV, block_size, D], one layer of the pool; written at ``slots_T``.
        slots_T: as in ``kv_ops.api.write_kv``.
        norms: before the rotation; None: none.

    Returns:
        The rotated queries, [T, H, D].
    """
    return reference.rotate_and_store(heads, cos_T, sin_T, kv_layer, slots_T, norms)
