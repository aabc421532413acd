"""Bytes of weights in the form that computes. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from eagleray.core.kv_layout import DTYPE_BYTES
from eagleray.models.model_config import ModelConfig

# Per weight; int4 with its scales, a float32 for each 128. With 8 bits a scale serves a whole output feature.
_QUANTIZED_BYTES: Final = {"w8a8": 1.0, "int8": 1.0, "int4": 0.5 + 4 / 128}
_QUANTIZED_HEAD_BYTES: Final = 1.0  # of the layer that makes logits, whatever the others have


@dataclass(frozen=True)
class LinearBytes:
    """How linear layers are kept: packed, as native kernels do, or as they are; quantised or not."""

    is_packed: bool = True
    quantization: str | None = None  # a value of ``model.quantization``

    def per_weight(self, stored_dtype: str, dtype: str) -> float:
        """Of a layer that a checkpoint has in ``stored_dtype`` and that computes in ``dtype``: two bytes where either
        has them, less where it is quantised. Not packed it is of ``dtype``."""
        if not self.is_packed:
            return DTYPE_BYTES[dtype]
        if self.quantization is not None:
            return _QUANTIZED_BYTES[self.quantization]
        return DTYPE_BYTES["bfloat16"] if stored_dtype == "bfloat16" else DTYPE_BYTES[dtype]


def weight_bytes(model: ModelConfig, dtype: str, linears: LinearBytes) -> int:
    """Of one copy of a model's weights. Not packed, a tied head is the embedding."""
    hidden, heads = model.hidden_size, model.num_heads + 2 * model.num_kv_heads
    attention = hidden * model.head_dim * (heads + model.num_heads)
    layers = model.num_layers * (attention + 3 * hidden * model.intermediate_size)
    embedding = hidden * model.vocab_size
    per_weight = linears.per_weight(model.dtype, dtype)
    if not linears.is_packed:
        return int(per_weight * (layers + embedding * (1 if model.tie_word_embeddings else 2)))
    per_head_weight = per_weight if linears.quantization is None else _QUANTIZED_HEAD_BYTES
    return int(layers * per_weight + embedding * (per_head_weight + DTYPE_BYTES[model.dtype]))
