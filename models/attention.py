"""Grouped-query attention over paged KV. Suffixes: T tokens, H query heads, HKV key and value heads, D head_dim."""

from __future__ import annotations

import torch

from eagleray.kernels.norm_rope.head_norms import HeadNorms
from eagleray.kernels.paged_attention.api import AttentionPlan
from eagleray.kernels.select import Kernels
from eagleray.models.linear import Linear
from eagleray.models.model_config import ModelConfig
from eagleray.models.norm import RMSNorm


class Attention:
    """One layer's attention, with query, key and value in one projection."""

    def __init__(
        self,
        config: ModelConfig,
        layer_index: int,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        input_size: int | None = None,  # of what queries, keys and values are made from; None: hidden_size
    ) -> None:
        self.head_dim = config.head_dim
        self._kernels = kernels
        self.scale = config.head_dim**-0.5
        self.sliding_window = config.sliding_window[layer_index]
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = Linear(
            input_size or config.hidden_size,
            (query_size, kv_size, kv_size),
            bias=config.qkv_bias,
            dtype=dtype,
            device=device,
        )
        self.output = Linear(query_size, (config.hidden_size,), bias=config.output_bias, dtype=dtype, device=device)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps, kernels, dtype=dtype, device=device)
            self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps, kernels, dtype=dtype, device=device)
        self.head_norms = _head_norms(self.query_norm, self.key_norm)

    def __call__(
        self,
        hidden: torch.Tensor,  # [T, input_size]
        cos_T: torch.Tensor,  # [T, D]
        sin_T: torch.Tensor,
        kv_layer: torch.Tensor,  # [num_blocks, 2, HKV, block_size, D]; the step's tokens are written
        plan: AttentionPlan,
        residual: torch.Tensor,  # [T, hidden]
    ) -> torch.Tensor:
        """[T, input_size] -> [T, hidden], added to ``residual``."""
        num_tokens = hidden.shape[0]
        heads = self.qkv(hidden).view(num_tokens, -1, self.head_dim)
        query = self._kernels.rotate_and_store(heads, cos_T, sin_T, kv_layer, plan.slots_T, self.head_norms)
        context = self._kernels.paged_attention(query, kv_layer, plan, self.scale, self.sliding_window)
        return self.output(context.view(num_tokens, -1), residual)

    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.output)


def _head_norms(query_norm: RMSNorm | None, key_norm: RMSNorm | None) -> HeadNorms | None:
    if query_norm is None or key_norm is None:
        return None
    return HeadNorms(query_norm.weight, key_norm.weight, query_norm.eps)
