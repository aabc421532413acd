"""Weights as integers with scales: the formats, and how weights and activations are rounded to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

# w8a8: weights and activations in int8; int8 and int4: weights only.
Quantization = Literal["w8a8", "int8", "int4"]
INT4_GROUP: Final = 128  # input features with one scale; with 8 bits a scale serves a whole output feature
# Counts the ways in which ``quantize_weight`` has rounded: files packed in another are not what it makes now.
ROUNDING_VERSION: Final = 1
_LARGEST: Final = {"w8a8": 127, "int8": 127, "int4": 7}
_ROWS_AT_ONCE: Final = 4096


class QuantizationUnsupported(Exception):
    """A weight or a machine that a format cannot serve, for the reason in the message."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """``values`` times ``scales``, each over its group of input features."""

    values: torch.Tensor  # int8 [out_features, in_features]
    scales: torch.Tensor  # float32 [groups, out_features]

    def dequantized(self) -> torch.Tensor:
        """float32 [out_features, in_features]."""
        out_features, in_features = self.values.shape
        grouped = self.values.float().view(out_features, len(self.scales), -1)
        return (grouped * self.scales.T.unsqueeze(-1)).view(out_features, in_features)


def quantize_weight(weight: torch.Tensor, quantization: Quantization) -> QuantizedWeight:
    """Round a ``weight`` [out_features, in_features] to the nearest integers, symmetrically around zero.

    Raises ``QuantizationUnsupported`` when groups do not divide in_features.
    """
    out_features, in_features = weight.shape
    group = INT4_GROUP if quantization == "int4" else in_features
    if in_features % group:
        raise QuantizationUnsupported(
            f"{quantization} takes groups of {group} input features, a layer has {in_features}"
        )
    values = torch.empty(out_features, in_features, dtype=torch.int8)
    scales = torch.empty(in_features // group, out_features)
    for first in range(0, out_features, _ROWS_AT_ONCE):  # a float32 copy of a large weight never exists whole
        rows = slice(first, first + _ROWS_AT_ONCE)
        grouped = weight[rows].float().view(-1, in_features // group, group)
        scale = grouped.abs().amax(-1) / _LARGEST[quantization]
        scales[:, rows] = scale.T
        values[rows] = _round(grouped, scale).flatten(1).to(torch.int8)
    return QuantizedWeight(values, scales)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers up to 127 in float32 [rows, features], and the scale [rows] of each row."""
    scale = x.float().abs().amax(-1) / 127
    return _round(x.float(), scale), scale


def _round(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """To whole steps of ``scale``, ties to even; where that is zero, ``x`` is zero too."""
    return (x / scale.masked_fill(scale == 0, 1.0).unsqueeze(-1)).round()
