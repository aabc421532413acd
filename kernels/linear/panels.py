"""Linear layers by the native library, from weights in bfloat16 or quantised, with activations in bfloat16 or float32.

Of one weight, a row gets the same bits whatever else is in the batch, and with any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

from eagleray.kernels.linear.api import PackedLinear
from eagleray.kernels.linear.quantization import (
    ROUNDING_VERSION,
    QuantizationUnsupported,
    QuantizedWeight,
    quantize_weight,
)
from eagleray.kernels.native.arguments import new_rows, rows_of
from eagleray.kernels.native.library import ELEMENTS, NativeLibrary, address

PanelWeights = Literal["bfloat16", "int8", "int4", "w8a8"]

_CODES: Final = {"bfloat16": 0, "int8": 1, "int4": 2, "w8a8": 3}  # enum weights in panels.h
_CHUNK_FEATURES: Final = {"bfloat16": 32, "int8": 64, "int4": 64, "w8a8": 64}  # in_features is padded to a multiple
_LAYOUT_VERSION: Final = 1  # of the bytes below; another whenever they change
_COLUMNS: Final = 32  # output features of a panel
_INT4_GROUPS: Final = range(32, 513, 32)  # input features with one scale, as panel_linear.c takes them
_NIBBLE_SHIFTS: Final = ((0, 16), (4, 20), (8, 24), (12, 28))  # of eight int4 that follow one another, in a word


@dataclass(frozen=True, slots=True)
class PanelLinear:
    """Implements ``LinearProduct`` with panels that it only reads; see ``PanelLinearFormat``."""

    library: NativeLibrary
    weights: PanelWeights
    panels: torch.Tensor  # int32 [panels, words of a column, columns]
    scales: torch.Tensor | None  # float32 [groups, panels * columns]
    column_sums: torch.Tensor | None  # int32 [panels * columns], of weights that meet activations in 8 bits
    bias: torch.Tensor | None  # float32 [out_features]
    out_features: int
    in_features: int  # the panels may have more, which are zero

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        self._check_input(x)
        rows = rows_of(x)
        out = new_rows(len(rows), self.out_features, dtype or x.dtype)
        if residual is not None:
            shape = (*x.shape[:-1], self.out_features)
            if residual.shape != shape or residual.dtype is not out.dtype:
                raise ValueError(
                    f"residual is {residual.dtype} {list(residual.shape)}, the product {out.dtype} {list(shape)}"
                )
            residual = rows_of(residual)
        failed = self.library.panel_linear(
            *(rows.data_ptr(), rows.stride(0), ELEMENTS[rows.dtype]),
            *(self.panels.data_ptr(), _CODES[self.weights], address(self.scales), self._group()),
            *(address(self.column_sums), address(self.bias)),
            *(address(residual), 0 if residual is None else residual.stride(0)),
            *(out.data_ptr(), out.stride(0), ELEMENTS[out.dtype]),
            *(len(rows), self.panels.shape[1], x.shape[-1], self.out_features, self.library.num_threads),
        )
        if failed:
            raise MemoryError(f"no memory for {len(rows)} rows of activations")
        return out if x.ndim == 2 else out.reshape(*x.shape[:-1], self.out_features)

    def _group(self) -> int:
        """Input features with one scale; 0: all of them."""
        return self.in_features // len(self.scales) if self.weights == "int4" and self.scales is not None else 0

    def _check_input(self, x: torch.Tensor) -> None:
        if x.dtype not in ELEMENTS or x.shape[-1] != self.in_features:
            wanted = f"float32 or bfloat16 [..., {self.in_features}]"
            raise ValueError(f"x is {x.dtype} {list(x.shape)}; this layer takes {wanted}")


@dataclass(frozen=True, slots=True)
class PanelLinearFormat:
    """Implements ``LinearFormat``: panels of 32 output features, words of consecutive input features beside each other
    (panels.h says how). The bytes are the same for every CPU.

    Scales are a tensor of their own, one row per group of input features, so that zero points and an order of the input
    features can join them.
    """

    library: NativeLibrary
    weights: PanelWeights

    @property
    def layout(self) -> str:
        rounding = "" if self.weights == "bfloat16" else f", rounding {ROUNDING_VERSION}"
        return f"{self.weights}-panels-{_COLUMNS}, version {_LAYOUT_VERSION}{rounding}"

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See ``LinearFormat.pack``. Raises ``QuantizationUnsupported`` for in_features that groups do not divide."""
        if self.weights != "bfloat16":
            return self.pack_integers(quantize_weight(weight, self.weights), bias)
        words = _padded_columns(weight.bfloat16(), "bfloat16").view(torch.int32)
        return PackedLinear(self._tensors(words, bias), *weight.shape)

    def pack_integers(self, quantized: QuantizedWeight, bias: torch.Tensor | None) -> PackedLinear:
        """Of a weight that was rounded already. With 8 bits one scale serves all input features of an output feature.

        Raises ``QuantizationUnsupported`` for groups that the products do not know.
        """
        out_features, in_features = quantized.values.shape
        group = -(-in_features // len(quantized.scales))
        is_known = group in _INT4_GROUPS if self.weights == "int4" else len(quantized.scales) == 1
        if not is_known or in_features % group:
            raise QuantizationUnsupported(f"{self.weights} has no scales over {group} input features")
        tensors = self._tensors(_words(quantized, self.weights), bias)
        num_columns = len(tensors["panels"]) * _COLUMNS
        tensors["scales"] = torch.zeros(len(quantized.scales), num_columns)
        tensors["scales"][:, :out_features] = quantized.scales
        if self.weights == "w8a8":
            tensors["column_sums"] = torch.zeros(num_columns, dtype=torch.int32)
            tensors["column_sums"][:out_features] = quantized.values.sum(1, dtype=torch.int32)
        return PackedLinear(tensors, out_features, in_features)

    def _tensors(self, words: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        out_features, num_words = words.shape
        num_panels = -(-out_features // _COLUMNS)
        panels = torch.empty(num_panels, num_words, _COLUMNS, dtype=torch.int32)
        self.library.pack_panels(
            words.data_ptr(), out_features, num_words, num_panels, panels.data_ptr(), self.library.num_threads
        )
        return {"panels": panels} if bias is None else {"panels": panels, "bias": bias.float().contiguous()}

    def bind(self, packed: PackedLinear) -> PanelLinear:
        """See ``LinearFormat.bind``."""
        tensors = packed.tensors
        return PanelLinear(
            self.library,
            self.weights,
            tensors["panels"],
            tensors.get("scales"),
            tensors.get("column_sums"),
            tensors.get("bias"),
            packed.out_features,
            packed.in_features,
        )


def _padded(in_features: int, weights: PanelWeights) -> int:
    chunk = _CHUNK_FEATURES[weights]
    return -(-in_features // chunk) * chunk


def _padded_columns(weight: torch.Tensor, weights: PanelWeights) -> torch.Tensor:
    in_features = weight.shape[1]
    return torch.nn.functional.pad(weight, (0, _padded(in_features, weights) - in_features)).contiguous()


def _words(quantized: QuantizedWeight, weights: PanelWeights) -> torch.Tensor:
    """int32 [out_features, words]."""
    values = _padded_columns(quantized.values, weights)
    if weights != "int4":
        return values.view(torch.int32)
    words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int32)
    for index, shift in enumerate(shift for pair in _NIBBLE_SHIFTS for shift in pair):
        words |= (values[:, index::8] + 8).to(torch.int32) << shift
    return words
