"""Linear layers by oneDNN, in its own weight layout, through operators of torch that are not public: probe first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eagleray.kernels.linear.api import PackedLinear

_PROBE_SHAPE = (64, 64)


@dataclass(frozen=True, slots=True)
class OneDNNLinear:
    """Implements ``LinearProduct``; see ``OneDNNLinearFormat``."""

    packed: torch.Tensor  # opaque to torch
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return product if residual is None else product.add_(residual)


@dataclass(frozen=True, slots=True)
class OneDNNLinearFormat:
    """Implements ``LinearFormat`` in the dtype of computing. What oneDNN packs cannot leave the process."""

    dtype: torch.dtype

    @property
    def layout(self) -> None:
        return None

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """See ``LinearFormat.pack``."""
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype).contiguous())
        tensors = {"weight": packed} if bias is None else {"weight": packed, "bias": bias.to(self.dtype)}
        return PackedLinear(tensors, len(weight))

    def bind(self, packed: PackedLinear) -> OneDNNLinear:
        """See ``LinearFormat.bind``."""
        return OneDNNLinear(packed.tensors["weight"], packed.tensors.get("bias"))


def prepare_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> OneDNNLinear:
    """Pack ``weight`` [out_features, in_features] to compute in its own dtype, and bind it."""
    linear_format = OneDNNLinearFormat(weight.dtype)
    return linear_format.bind(linear_format.pack(weight, bias))


def is_available(dtype: torch.dtype) -> bool:
    """Whether the operators exist and compute the right thing in ``dtype``."""
    weight = torch.linspace(-1, 1, _PROBE_SHAPE[0] * _PROBE_SHAPE[1], dtype=torch.float32).view(_PROBE_SHAPE)
    x = weight[:3].flip(1).to(dtype)
    try:
        found = prepare_linear(weight.to(dtype), None)(x)
    except (AttributeError, RuntimeError):
        return False
    expected = x.float() @ weight.to(dtype).float().T
    return torch.allclose(found.float(), expected, rtol=2e-2, atol=2e-2)
