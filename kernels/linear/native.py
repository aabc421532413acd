"""Linear layers in float32 by the native library: the same bits for a row whatever else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eagleray.kernels.native.library import ELEMENTS, NativeLibrary, address


@dataclass(frozen=True, slots=True)
class NativeLinear:
    """Implements ``LinearProduct`` with its own copy of the weight; see ``prepare_linear``."""

    library: NativeLibrary
    packed: torch.Tensor  # [panels, in_features, columns of a panel]; float32, or bfloat16 where that is exact
    bias: torch.Tensor | None  # float32 [out_features]
    out_features: int

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        in_features = self.packed.shape[1]
        if x.dtype is not torch.float32 or x.shape[-1] != in_features:
            raise ValueError(f"x is {x.dtype} {list(x.shape)}; this layer takes float32 [..., {in_features}]")
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


def prepare_linear(library: NativeLibrary, weight: torch.Tensor, bias: torch.Tensor | None) -> NativeLinear:
    """Pack a float32 ``weight`` [out_features, in_features], into bfloat16 if that changes none of its values."""
    out_features, in_features = weight.shape
    weight = weight.contiguous()
    dtype = torch.bfloat16 if torch.equal(weight.to(torch.bfloat16).float(), weight) else torch.float32
    columns = library.panel_columns()
    packed = torch.empty(-(-out_features // columns), in_features, columns, dtype=dtype)
    library.pack_weight(weight.data_ptr(), out_features, in_features, ELEMENTS[dtype], packed.data_ptr())
    return NativeLinear(library, packed, None if bias is None else bias.contiguous(), out_features)
