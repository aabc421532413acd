"""Linear layers by oneDNN, in its own weight layout, through operators of torch that are not public: probe first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_PROBE_SHAPE = (64, 64)


@dataclass(frozen=True, slots=True)
class OneDNNLinear:
    """Implements ``LinearProduct``; see ``prepare_linear``."""

    packed: torch.Tensor  # opaque to torch
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return product if residual is None else product.add_(residual)


def prepare_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> OneDNNLinear:
    """Pack ``weight`` [out_features, in_features]."""
    return OneDNNLinear(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), bias)


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
