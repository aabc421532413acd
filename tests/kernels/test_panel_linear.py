"""Linear layers over panels, bfloat16 and quantised, on every level."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
import xxhash

from eagleray.kernels.linear.api import LinearProduct
from eagleray.kernels.linear.panels import PanelLinearFormat, PanelWeights
from eagleray.kernels.linear.quantization import (
    Quantization,
    QuantizationUnsupported,
    QuantizedWeight,
    quantize_rows,
    quantize_weight,
)
from eagleray.kernels.linear.reference import TorchLinear, TorchQuantizedFormat
from eagleray.kernels.native.library import NativeLibrary

Load = Callable[..., NativeLibrary]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
WEIGHTS: tuple[PanelWeights, ...] = get_args(PanelWeights)
DTYPES = (torch.float32, torch.bfloat16)
BYTES = {
    "bfloat16-panels-32, version 1": "fba37af78808653b",
    "int8-panels-32, version 1, rounding 1": "acb389131f2d7690",
    "int4-panels-32, version 1, rounding 1": "801e1115a3ac68a8",
    "w8a8-panels-32, version 1, rounding 1": "5654f26d348d5208",
    "int8-rows, rounding 1": "a3bc0236693a3c7a",
    "int4-rows, rounding 1": "7a6a71c0aee1328b",
    "w8a8-rows, rounding 1": "a3bc0236693a3c7a",
}  # of what the test below packs
HALF_STEP = {torch.float32: 2**-24, torch.bfloat16: 2**-8}  # of a number, when it is rounded


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def prepare(
    library: NativeLibrary, weights: PanelWeights, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> LinearProduct:
    linear_format = PanelLinearFormat(library, weights)
    return linear_format.bind(linear_format.pack(weight, bias))


def rounding_bound(
    exact: torch.Tensor, sum_of_sizes: torch.Tensor, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """Of a sum in float32, every product and addition of which may round once, and of its result in ``dtype``."""
    sums = (2 * in_features + 4) * 2**-24 * sum_of_sizes
    return sums + (exact.abs() + sums) * HALF_STEP[dtype]


@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 17, 33, 300])
@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (32, 64), (100, 257), (33, 640)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bfloat16_weights_equal_the_reference(
    library: NativeLibrary, shape: tuple[int, int], num_rows: int, dtype: torch.dtype
) -> None:
    weight, bias = random(*shape).bfloat16(), random(shape[0])
    x, residual = random(num_rows, shape[1]).to(dtype), random(num_rows, shape[0]).to(dtype)
    exact = TorchLinear(weight.double(), bias.double())(x.double(), residual.double())
    sizes = TorchLinear(weight.abs().double(), bias.abs().double())(x.abs().double(), residual.abs().double())
    found = prepare(library, "bfloat16", weight, bias)(x, residual)
    assert found.dtype is dtype
    assert bool(((found - exact).abs() <= rounding_bound(exact, sizes, shape[1], dtype)).all())


@pytest.mark.parametrize("num_rows", [1, 17, 40])
@pytest.mark.parametrize("shape", [(70, 128), (33, 640), (32, 1152)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantised_weights_equal_their_reference(
    library: NativeLibrary, quantization: Quantization, shape: tuple[int, int], num_rows: int, dtype: torch.dtype
) -> None:
    weight, bias = random(*shape), random(shape[0])
    x, residual = random(num_rows, shape[1]).to(dtype), random(num_rows, shape[0]).to(dtype)
    reference_format = TorchQuantizedFormat(quantization)
    reference = reference_format.bind(reference_format.pack(weight, bias))
    expected = reference(x.float(), residual.float(), torch.float32)
    sizes = x.abs().float() @ reference.weight.dequantized().abs().T + bias.abs() + residual.abs().float()
    found = prepare(library, quantization, weight, bias)(x, residual)
    assert bool(((found - expected).abs() <= 2 * rounding_bound(expected, sizes, shape[1], dtype)).all())


def integers(out_features: int, in_features: int, group: int) -> QuantizedWeight:
    values = (4 * random(out_features, in_features)).round().clamp(-8, 7).to(torch.int8)
    return QuantizedWeight(values, random(in_features // group, out_features).abs())


@pytest.mark.parametrize("num_rows", [1, 5, 17, 40])
@pytest.mark.parametrize("group", [32, 64, 96, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_has_a_scale_for_each_group_whatever_its_size(
    library: NativeLibrary, group: int, num_rows: int, dtype: torch.dtype
) -> None:
    weight, x = integers(70, 3 * group, group), random(num_rows, 3 * group).to(dtype)
    linear_format = PanelLinearFormat(library, "int4")
    found = linear_format.bind(linear_format.pack_integers(weight, None))(x, dtype=torch.float32)
    expected = x.float() @ weight.dequantized().T
    sizes = x.abs().float() @ weight.dequantized().abs().T
    assert bool(((found - expected).abs() <= 2 * rounding_bound(expected, sizes, 3 * group, torch.float32)).all())


def test_groups_that_products_do_not_know_are_refused(load: Load) -> None:
    for group in (16, 48, 544):
        with pytest.raises(QuantizationUnsupported, match=f"no scales over {group} input features"):
            PanelLinearFormat(load(), "int4").pack_integers(integers(40, 4 * group, group), None)
    uneven = QuantizedWeight(torch.zeros(40, 90, dtype=torch.int8), torch.ones(3, 40))
    with pytest.raises(QuantizationUnsupported, match="no scales over 30 input features"):
        PanelLinearFormat(load(), "int4").pack_integers(uneven, None)
    uneven = QuantizedWeight(torch.zeros(40, 95, dtype=torch.int8), torch.ones(3, 40))
    with pytest.raises(QuantizationUnsupported, match="no scales over 32 input features"):
        PanelLinearFormat(load(), "int4").pack_integers(uneven, None)
    with pytest.raises(QuantizationUnsupported, match="int8 has no scales over 64 input features"):
        PanelLinearFormat(load(), "int8").pack_integers(integers(40, 128, 64), None)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_quantised_weight_is_off_by_no_more_than_half_a_step(quantization: Quantization) -> None:
    weight = random(50, 256)
    quantized = quantize_weight(weight, quantization)
    step = quantized.scales.T.repeat_interleave(256 // len(quantized.scales), 1)
    assert bool(((quantized.dequantized() - weight).abs() <= step * (0.5 + 2**-20)).all())
    assert quantized.values.abs().max() == {"int4": 7}.get(quantization, 127)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_reference_is_as_far_from_the_float_layer_as_its_steps_say(quantization: Quantization) -> None:
    weight, x = random(50, 256), random(9, 256)
    linear_format = TorchQuantizedFormat(quantization)
    product = linear_format.bind(linear_format.pack(weight, None))
    steps = product.weight.scales.T.repeat_interleave(256 // len(product.weight.scales), 1)
    bound = x.abs() @ (steps / 2).T
    if quantization == "w8a8":
        scale = quantize_rows(x)[1].unsqueeze(-1)
        bound = (x.abs() + scale / 2) @ (steps / 2).T + scale / 2 * weight.abs().sum(1)
    assert bool(((product(x) - x @ weight.T).abs() <= bound * 1.001).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch(
    library: NativeLibrary, weights: PanelWeights, dtype: torch.dtype
) -> None:
    product, x = prepare(library, weights, random(130, 640), random(130)), random(300, 640).to(dtype)
    residual = random(300, 130).to(dtype)
    whole, added = product(x), product(x, residual)
    for start, end in ((0, 1), (3, 9), (7, 24), (140, 190), (10, 290)):
        assert torch.equal(product(x[start:end]), whole[start:end])
        assert torch.equal(product(x[start:end], residual[start:end]), added[start:end])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_number_of_threads_changes_nothing(library: NativeLibrary, load: Load, weights: PanelWeights) -> None:
    weight, x = random(1000, 256), random(300, 256).bfloat16()
    one, two = (prepare(load(library.level, count), weights, weight)(x) for count in (1, 2))
    assert torch.equal(one, two)


def test_w8a8_gives_the_same_bits_on_every_level_with_fused_multiply_add(library: NativeLibrary, load: Load) -> None:
    if library.level == "portable":
        pytest.skip("this level does not fuse products with their sums")
    weight, bias, x = random(100, 700), random(100), random(40, 700)
    found, expected = (prepare(one, "w8a8", weight, bias)(x) for one in (library, load()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_packed_bytes_are_the_same_on_every_level(library: NativeLibrary, load: Load, weights: PanelWeights) -> None:
    weight = random(100, 384)
    found, expected = (PanelLinearFormat(one, weights).pack(weight, None).tensors for one in (library, load()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_float32_result_is_not_rounded_to_the_dtype_of_x(load: Load) -> None:
    product, x = prepare(load(), "bfloat16", random(40, 64)), random(5, 64).bfloat16()
    wide = product(x, dtype=torch.float32)
    assert torch.equal(wide.bfloat16(), product(x))
    assert not torch.equal(wide, product(x).float())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_takes_rows_that_are_views_leading_dimensions_and_none(library: NativeLibrary, weights: PanelWeights) -> None:
    product, wide = prepare(library, weights, random(40, 128)), random(6, 200).bfloat16()
    assert torch.equal(product(wide[:, 3:131]), product(wide[:, 3:131].contiguous()))
    assert torch.equal(product(random(2, 3, 128)), product(random(2, 3, 128).view(6, 128)).view(2, 3, 40))
    assert product(wide[:0, :128]).shape == (0, 40)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden_by_int8_activations(library: NativeLibrary, value: float) -> None:
    x = random(3, 128)
    x[1, 5] = value
    found = prepare(library, "w8a8", random(40, 128))(x)
    assert bool(found[1].isnan().all())
    assert bool(found[[0, 2]].isfinite().all())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_of_zeros_give_the_bias(library: NativeLibrary, weights: PanelWeights) -> None:
    bias = random(40)
    assert torch.equal(prepare(library, weights, random(40, 128), bias)(torch.zeros(3, 128)), bias.expand(3, 40))
    assert torch.equal(prepare(library, weights, torch.zeros(40, 128), bias)(random(3, 128)), bias.expand(3, 40))


def test_int4_refuses_input_features_that_its_groups_do_not_divide(load: Load) -> None:
    with pytest.raises(QuantizationUnsupported, match="groups of 128 input features, a layer has 192"):
        prepare(load(), "int4", random(8, 192))


def test_other_shapes_and_types_are_refused(load: Load) -> None:
    product = prepare(load(), "bfloat16", random(40, 64))
    with pytest.raises(ValueError, match=r"bfloat16 \[..., 64\]"):
        product(random(2, 65))
    with pytest.raises(ValueError, match=r"bfloat16 \[..., 64\]"):
        product(random(2, 64).half())
    with pytest.raises(ValueError, match="residual"):
        product(random(2, 64), random(2, 64))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_bytes_of_a_layout_are_those_that_its_name_stands_for(load: Load, weights: PanelWeights) -> None:
    """Files keep them under that name: whoever changes the bytes gives the layout another version."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1000, 1000, (40, 256), generator=generator) / 512
    formats = [PanelLinearFormat(load(), weights)]
    if weights != "bfloat16":
        formats.append(TorchQuantizedFormat(weights))  # type: ignore[arg-type]
    found = {}
    for linear_format in formats:
        hasher = xxhash.xxh3_64()
        for name, tensor in sorted(linear_format.pack(weight, torch.arange(40.0)).tensors.items()):
            hasher.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
        found[linear_format.layout] = hasher.hexdigest()
    assert found == {layout: digest for layout, digest in BYTES.items() if layout.startswith(f"{weights}-")}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_that_are_padded_to_the_same_width_are_still_told_apart(load: Load, weights: PanelWeights) -> None:
    product = prepare(load(), weights, random(32, 640))
    for width in (639, 641, 608, 704):
        with pytest.raises(ValueError, match=r"takes float32 or bfloat16 \[\.\.\., 640\]"):
            product(random(2, width))
    if weights != "int4":
        with pytest.raises(ValueError, match=r"\[\.\.\., 33\]"):
            prepare(load(), weights, random(32, 33))(random(2, 34))
