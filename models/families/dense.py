"""What the dense families have in common: the names that ``config.json`` gives to an architecture's sizes."""

from __future__ import annotations

from typing import Final

from eagleray.core.kv_layout import DTYPE_BYTES
from eagleray.models.families.fields import Fields
from eagleray.models.families.rope import read_rope
from eagleray.models.model_config import ModelConfig

_SILU_NAMES: Final = ("silu", "swish")


def read_dense(
    fields: Fields,
    *,
    default_max_position_embeddings: int,
    default_head_dim: int | None = None,
    sliding_window: tuple[int | None, ...] | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> ModelConfig:
    """A ``ModelConfig``; fields that are missing take transformers' defaults. Raises ``ConfigError``.

    ``sliding_window`` None means full attention in every layer.
    """
    num_layers, num_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    max_position_embeddings = fields.integer("max_position_embeddings", default_max_position_embeddings)
    if fields.raw("hidden_act") not in (None, *_SILU_NAMES):
        raise fields.error("hidden_act", "only silu is supported")
    bos_token_ids = fields.token_ids("bos_token_id")
    return ModelConfig(
        model_type=fields.raw("model_type"),
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, num_heads),
        head_dim=_head_dim(fields, num_heads, default_head_dim),
        max_position_embeddings=max_position_embeddings,
        sliding_window=sliding_window or (None,) * num_layers,
        rope=read_rope(fields, max_position_embeddings),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        dtype=_dtype(fields),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def read_layer_windows(fields: Fields) -> tuple[int | None, ...]:
    """Qwen's ways to give some layers a window: ``layer_types``, or else ``max_window_layers``."""
    num_layers = fields.integer("num_hidden_layers")
    window = fields.optional_integer("sliding_window", 4096) if fields.boolean("use_sliding_window", False) else None
    kinds = fields.raw("layer_types")
    if kinds is None:
        num_full_layers = num_layers if window is None else fields.integer("max_window_layers", 28, minimum=0)
        kinds = ["full_attention" if layer < num_full_layers else "sliding_attention" for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", f"must be a list of {num_layers} kinds, one per layer")
    if set(kinds) - {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", "only full_attention and sliding_attention are supported")
    if window is None and "sliding_attention" in kinds:
        raise fields.error("layer_types", "has sliding_attention, but no window is set; set use_sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _num_kv_heads(fields: Fields, num_heads: int) -> int:
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads={num_heads}")
    return num_kv_heads


def _head_dim(fields: Fields, num_heads: int, default: int | None) -> int:
    hidden_size = fields.integer("hidden_size")
    if default is None and fields.raw("head_dim") is None and hidden_size % num_heads:
        raise fields.error(
            "hidden_size", f"must be a multiple of num_attention_heads={num_heads} unless head_dim is set"
        )
    head_dim = fields.integer("head_dim", default or hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", "must be even to be rotated")
    return head_dim


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.raw("dtype") is not None else "torch_dtype"
    dtype = fields.raw(name) or "float32"  # holds every value of the 16-bit formats
    if dtype not in DTYPE_BYTES:
        raise fields.error(name, f"is not supported; supported: {', '.join(DTYPE_BYTES)}")
    return str(dtype)
