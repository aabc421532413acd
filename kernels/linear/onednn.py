"""Linear layers in bfloat16 by oneDNN through torch, whose weights are put in its order once and not at every call.

For where torch computes. How a row is summed depends on the batch, as it does in torch's own layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from eagleray.kernels.linear.api import PackedLinear

# The order is the best one for so many rows, and right for any number. Decode steps have few, and reading is what
# takes their time.
_EXPECTED_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class OneDnnLinear:
    """Implements ``LinearProduct``; see ``OneDnnFormat``."""

    weight: torch.Tensor  # opaque
    bias: torch.Tensor | None  # bfloat16 [out_features]

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        product = product.to(dtype or x.dtype)
        return product if residual is None else residual + product


@dataclass(frozen=True, slots=True)
class OneDnnFormat:
    """Implements ``LinearFormat`` for bfloat16, in an order of oneDNN's own."""

    @property
    def layout(self) -> None:
        return None

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See ``LinearFormat.pack``."""
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous(), _EXPECTED_ROWS)
        tensors = {"weight": ordered} if bias is None else {"weight": ordered, "bias": bias.bfloat16().contiguous()}
        return PackedLinear(tensors, *weight.shape)

    def bind(self, packed: PackedLinear) -> OneDnnLinear:
        """See ``LinearFormat.bind``."""
        return OneDnnLinear(packed.tensors["weight"], packed.tensors.get("bias"))


def onednn_is_there() -> bool:
    """Whether torch has these operations, which no document promises, and they compute on this CPU."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        small = torch.ones(16, 16, dtype=torch.bfloat16)
        OneDnnFormat().bind(OneDnnFormat().pack(small, None))(small)
    except (AttributeError, RuntimeError):
        return False
    return True
