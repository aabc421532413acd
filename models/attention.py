"""Grouped-query attention over paged KV. Suffixes: T tokens, H query heads, HKV key and value heads, D head_dim."""

from __future__ import annotations

import torch
from torch import nn

from eagleray.kernels.kv_ops.api import write_kv
from eagleray.kernels.norm_rope.api import apply_rope
from eagleray.kernels.paged_attention.api import AttentionPlan, paged_attention
from eagleray.models.linear import Linear
from eagleray.models.model_config import ModelConfig
from eagleray.models.norm import RMSNorm


class Attention(nn.Module):
    """One layer's attention, with query, key and value in one projection."""

    def __init__(
        self, config: ModelConfig, layer_index: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self.sliding_window = config.sliding_window[layer_index]
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = Linear(
            config.hidden_size, (query_size, kv_size, kv_size), bias=config.qkv_bias, dtype=dtype, device=device
        )
        self.output = Linear(query_size, (config.hidden_size,), bias=config.output_bias, dtype=dtype, device=device)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
            self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)

    def forward(
        self,
        hidden: torch.Tensor,  # [T, hidden]
        cos_T: torch.Tensor,  # [T, D]
        sin_T: torch.Tensor,
        kv_layer: torch.Tensor,  # [num_blocks, 2, HKV, block_size, D]; the step's tokens are written
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        heads = self.qkv(hidden).view(len(hidden), -1, self.head_dim)
        query, key, value = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = apply_rope(query, key, cos_T, sin_T)
        write_kv(kv_layer, key, value, plan.slots_T)
        context = paged_attention(query, kv_layer, plan, self.scale, self.sliding_window)
        output: torch.Tensor = self.output(context.view(len(hidden), -1))
        return output
