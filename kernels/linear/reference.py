"""Linear layers in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from eagleray.kernels.linear.api import PackedLinear
from eagleray.kernels.linear.pieces import PIECE_WEIGHTS
from eagleray.kernels.linear.quantization import (
    ROUNDING_VERSION,
    Quantization,
    QuantizedWeight,
    quantize_rows,
    quantize_weight,
)


@dataclass(frozen=True, slots=True)
class TorchLinear:
    """Implements ``LinearProduct``; the weight stays as it is, and may be filled later."""

    weight: torch.Tensor  # [out_features, in_features]
    bias: torch.Tensor | None

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        product = linear(x, self.weight, self.bias).to(dtype or x.dtype)
        return product if residual is None else residual + product


@dataclass(frozen=True, slots=True)
class TorchQuantizedLinear:
    """Implements ``LinearProduct`` for quantised weights, in float32; see ``TorchQuantizedFormat``."""

    weight: QuantizedWeight
    bias: torch.Tensor | None  # float32 [out_features]
    quantizes_activations: bool

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if self.quantizes_activations:
            whole, scale = quantize_rows(x)
            sums = [whole.double() @ piece.values.double().T for piece in self._pieces()]  # exact
            product = torch.cat(sums, -1).float() * (scale.unsqueeze(-1) * self.weight.scales[0])
        else:
            product = torch.cat([x.float() @ piece.dequantized().T for piece in self._pieces()], -1)
        if self.bias is not None:
            product += self.bias
        if residual is not None:
            product += residual
        return product.to(dtype or x.dtype)

    def _pieces(self) -> Iterator[QuantizedWeight]:
        """One after the other: the whole weight as floating-point numbers would take more memory than unquantised."""
        out_features, in_features = self.weight.values.shape
        at_once = max(1, PIECE_WEIGHTS // in_features)
        for first in range(0, out_features, at_once):
            rows = slice(first, first + at_once)
            yield QuantizedWeight(self.weight.values[rows], self.weight.scales[:, rows])


@dataclass(frozen=True, slots=True)
class TorchQuantizedFormat:
    """Implements ``LinearFormat``: integers and scales, not rearranged."""

    quantization: Quantization

    @property
    def layout(self) -> str:
        return f"{self.quantization}-rows, rounding {ROUNDING_VERSION}"

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See ``LinearFormat.pack``. Raises ``QuantizationUnsupported`` for in_features that groups do not divide."""
        quantized = quantize_weight(weight, self.quantization)
        tensors = {"values": quantized.values, "scales": quantized.scales}
        if bias is not None:
            tensors["bias"] = bias.float()
        return PackedLinear(tensors, *weight.shape)

    def bind(self, packed: PackedLinear) -> TorchQuantizedLinear:
        """See ``LinearFormat.bind``."""
        weight = QuantizedWeight(packed.tensors["values"], packed.tensors["scales"])
        return TorchQuantizedLinear(weight, packed.tensors.get("bias"), self.quantization == "w8a8")
