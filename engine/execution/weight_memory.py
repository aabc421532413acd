"""Bytes of weights in the form that computes. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from eagleray.core.kv_layout import DTYPE_BYTES
from eagleray.models.model_config import ModelConfig

# Per weight; int4 with its scales, a float32 for each 128. With 8 bits a scale serves a whole output feature.
_QUANTIZED_BYTES: Final = {"w8a8": 1.0, "int8": 1.0, "int4": 0.5 + 4 / 128}
_TORCH_QUANTIZED_BYTES: Final = {"w8a8": 1.0, "int8": 1.0, "int4": 1.0 + 4 / 128}
_QUANTIZED_HEAD_BYTES: Final = 1.0  # of the layer that makes logits, whatever the others have


@dataclass(frozen=True)
class LinearBytes:
    """How linear layers are kept: by native kernels or by torch; quantised or not."""

    is_native: bool = True
    quantization: str | None = None  # a value of ``model.quantization``

    def per_weight(self, stored_dtype: str, dtype: str) -> float:
        """Of a layer that a checkpoint has in ``stored_dtype`` and that computes in ``dtype``: two bytes where either
        has them, less where it is quantised. Torch has it in ``dtype``, and quantised whole bytes."""
        if self.quantization is not None:
            return (_QUANTIZED_BYTES if self.is_native else _TORCH_QUANTIZED_BYTES)[self.quantization]
        if not self.is_native:
            return DTYPE_BYTES[dtype]
        return DTYPE_BYTES["bfloat16"] if stored_dtype == "bfloat16" else DTYPE_BYTES[dtype]

    @property
    def are_packed(self) -> bool:
        """In a form of their own, which a file can keep."""
        return self.is_native or self.quantization is not None


def weight_bytes(model: ModelConfig, dtype: str, linears: LinearBytes) -> int:
    """Of one copy of a model's weights."""
    if linears.are_packed:
        return packed_bytes(model, dtype, linears) + _embedding_weights(model) * DTYPE_BYTES[model.dtype]
    tables = _embedding_weights(model) * DTYPE_BYTES[dtype]
    if dtype == "bfloat16":  # counted as if oneDNN had an order of its own for the head (``kernels/linear/onednn.py``)
        tables += _embedding_weights(model) * max(DTYPE_BYTES[dtype], DTYPE_BYTES[model.dtype])
    elif not model.tie_word_embeddings:  # a tied head is the embedding
        tables *= 2
    return int(linears.per_weight(model.dtype, dtype) * _layer_weights(model)) + tables


def packed_bytes(model: ModelConfig, dtype: str, linears: LinearBytes) -> int:
    """Of one copy of the linear layers, the head among them."""
    per_weight = linears.per_weight(model.dtype, dtype)
    per_head_weight = per_weight if linears.quantization is None else _QUANTIZED_HEAD_BYTES
    return int(_layer_weights(model) * per_weight + _embedding_weights(model) * per_head_weight)


def _layer_weights(model: ModelConfig) -> int:
    """How many, in all layers."""
    heads = model.num_heads + 2 * model.num_kv_heads
    attention = model.hidden_size * model.head_dim * (heads + model.num_heads)
    return model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)


def _embedding_weights(model: ModelConfig) -> int:
    return model.hidden_size * model.vocab_size
