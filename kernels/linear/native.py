"""Linear layers in float32 by the native library: the same bits for a row whatever else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from eagleray.kernels.linear.api import PackedLinear
from eagleray.kernels.native.library import ELEMENTS, NativeLibrary, address

_PANELS_AT_ONCE: Final = 64
_ROWS_AT_ONCE: Final = 1024


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """Implements ``LinearProduct`` with panels that it only reads; see ``NativeLinearFormat``."""

    library: NativeLibrary
    packed: torch.Tensor  # [panels, in_features, columns of a panel]; float32, or bfloat16 where that is exact
    bias: torch.Tensor | None  # float32 [out_features]
    out_features: int

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        in_features = self.packed.shape[1]
        if x.dtype is not torch.float32 or dtype not in (None, x.dtype) or x.shape[-1] != in_features:
            raise ValueError(
                f"x is {x.dtype} {list(x.shape)}; this layer takes float32 [..., {in_features}] and gives float32"
            )
        rows = x if x.ndim == 2 else x.reshape(-1, in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        if residual is not None:
            if residual.shape != out.shape or residual.dtype is not torch.float32:
                raise ValueError(f"residual is {residual.dtype} {list(residual.shape)}, the product {list(out.shape)}")
            residual = residual.contiguous()
        self.library.linear(
            rows.data_ptr(),
            rows.stride(0),
            self.packed.data_ptr(),
            ELEMENTS[self.packed.dtype],
            address(self.bias),
            address(residual),
            out.data_ptr(),
            rows.shape[0],
            in_features,
            self.out_features,
            self.library.num_threads,
        )
        return out


@dataclass(frozen=True, slots=True)
class NativeLinearFormat:
    """Implements ``LinearFormat``: panels of output features, in bfloat16 if that changes no value of the weight."""

    library: NativeLibrary

    @property
    def layout(self) -> str:
        return f"panels of {self.library.panel_columns()}, {self.library.build}"

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See ``LinearFormat.pack``."""
        out_features, in_features = weight.shape
        dtype = torch.bfloat16 if _is_exact_in_bfloat16(weight) else torch.float32
        columns = self.library.panel_columns()
        panels = torch.empty(-(-out_features // columns), in_features, columns, dtype=dtype)
        for first in range(0, len(panels), _PANELS_AT_ONCE):  # a float32 copy of a large weight never exists whole
            rows = weight[first * columns : (first + _PANELS_AT_ONCE) * columns].float().contiguous()
            self.library.pack_weight(rows.data_ptr(), len(rows), in_features, ELEMENTS[dtype], panels[first].data_ptr())
        tensors = {"panels": panels} if bias is None else {"panels": panels, "bias": bias.float().contiguous()}
        return PackedLinear(tensors, out_features, in_features)

    def bind(self, packed: PackedLinear) -> NativeLinear:
        """See ``LinearFormat.bind``."""
        tensors = packed.tensors
        return NativeLinear(self.library, tensors["panels"], tensors.get("bias"), packed.out_features)


def _is_exact_in_bfloat16(weight: torch.Tensor) -> bool:
    if weight.dtype is torch.bfloat16:
        return True
    return all(torch.equal(rows.bfloat16().to(rows.dtype), rows) for rows in torch.split(weight, _ROWS_AT_ONCE))
