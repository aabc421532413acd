"""Linear layers by oneDNN, as far as this machine's torch and CPU have what they need."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eagleray.kernels.linear.onednn import OneDnnFormat, onednn_is_there
from eagleray.kernels.linear.reference import TorchLinear
from eagleray.kernels.select import select_kernels

needs_onednn = pytest.mark.skipif(not onednn_is_there(), reason="torch or the CPU lacks what oneDNN needs")


@needs_onednn
@pytest.mark.parametrize("num_rows", [1, 3, 16, 300])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(96, 64), (65, 130)])
def test_it_computes_what_torch_does(out_features: int, in_features: int, with_bias: bool, num_rows: int) -> None:
    weight = torch.randn(out_features, in_features).bfloat16()
    bias = torch.randn(out_features).bfloat16() if with_bias else None
    packed = OneDnnFormat().pack(weight, bias)
    assert (packed.out_features, packed.in_features) == (out_features, in_features)
    product, x = OneDnnFormat().bind(packed), torch.randn(2, num_rows, in_features).bfloat16()
    residual = torch.randn(2, num_rows, out_features).bfloat16()
    expected = TorchLinear(weight.float(), None if bias is None else bias.float())(x.float())
    for given in (None, residual):
        output = product(x, given)
        assert output.dtype is torch.bfloat16
        whole = expected if given is None else expected + given.float()
        torch.testing.assert_close(output.float(), whole, rtol=2**-7, atol=2**-4)
    assert product(x, dtype=torch.float32).dtype is torch.float32


@needs_onednn
def test_where_torch_computes_in_bfloat16_the_start_names_it(tmp_path: Path) -> None:
    kernels = select_kernels("torch", torch.bfloat16, "cpu", 1, tmp_path)
    assert kernels.description == "torch, linear layers: bfloat16 by oneDNN"
    assert kernels.linear_format == OneDnnFormat()


def cannot(*arguments: object) -> None:
    raise RuntimeError("could not create a primitive")


@needs_onednn
@pytest.mark.parametrize(
    "lacks",
    [
        {"_reorder_linear_weight": None},
        {"_linear_pointwise": None},
        {"_is_mkldnn_bf16_supported": None},
        {"_is_mkldnn_bf16_supported": lambda: False},
        {"_linear_pointwise": cannot},
    ],
    ids=["what orders", "what multiplies", "what tells", "instructions", "a primitive"],
)
def test_where_it_is_not_there_torch_computes_from_rows(
    lacks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    operations = {name: getattr(torch.ops.mkldnn, name) for name in names}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**operations))
    assert onednn_is_there()
    there = {name: operation for name, operation in (operations | lacks).items() if operation is not None}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**there))
    assert not onednn_is_there()
    kernels = select_kernels("torch", torch.bfloat16, "cpu", 1, tmp_path)
    assert kernels.description == "torch"
    assert kernels.linear_format is None
