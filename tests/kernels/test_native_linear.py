from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from eagleray.kernels.linear import native
from eagleray.kernels.linear.reference import TorchLinear
from eagleray.kernels.native.library import NativeLibrary

Load = Callable[..., NativeLibrary]
SHAPES = [(1, 1), (31, 5), (32, 256), (100, 257), (513, 700)]  # out_features, in_features


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def prepare(library: NativeLibrary, weight: torch.Tensor, bias: torch.Tensor | None) -> native.NativeLinear:
    linear_format = native.NativeLinearFormat(library)
    return linear_format.bind(linear_format.pack(weight, bias))


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 12, 13, 97, 200])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(library: NativeLibrary, shape: tuple[int, int], num_rows: int) -> None:
    weight, bias = random(*shape), random(shape[0])
    x, residual = random(num_rows, shape[1]), random(num_rows, shape[0])
    exact = TorchLinear(weight.double(), bias.double())(x.double(), residual.double())
    sum_of_sizes = TorchLinear(weight.abs(), bias.abs())(x.abs(), residual.abs())
    bound = (shape[1] + 2) * 2**-24 * sum_of_sizes  # every addition may round once
    found = prepare(library, weight, bias)(x, residual)
    assert bool(((found - exact).abs() <= bound).all())
    plain = prepare(library, weight, None)(x)
    assert bool(((plain - x.double() @ weight.double().T).abs() <= bound).all())


@pytest.mark.parametrize("num_rows", [1, 30])
def test_weights_that_bfloat16_holds_exactly_are_kept_in_it_and_give_the_same_bits(
    library: NativeLibrary, num_rows: int
) -> None:
    weight = random(100, 300).bfloat16().float()
    rounded = prepare(library, weight, None)
    assert rounded.packed.dtype is torch.bfloat16
    weight[0, 0] += 2**-20  # no longer exact: stays in float32
    wide = prepare(library, weight, None)
    assert wide.packed.dtype is torch.float32
    x = random(num_rows, 300)
    assert torch.equal(rounded(x)[:, 1:], wide(x)[:, 1:])


@pytest.mark.parametrize("is_exact_in_bfloat16", [False, True])
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch(
    library: NativeLibrary, is_exact_in_bfloat16: bool
) -> None:
    weight = random(130, 600)
    product = prepare(library, weight.bfloat16().float() if is_exact_in_bfloat16 else weight, None)
    x = random(150, 600)
    whole = product(x)
    for start, end in ((0, 1), (3, 9), (7, 20), (140, 150), (10, 120)):
        assert torch.equal(product(x[start:end]), whole[start:end])


def test_the_number_of_threads_changes_nothing(load: Load) -> None:
    weight, x = random(1000, 300), random(100, 300)
    one, two = (prepare(load(num_threads=count), weight, None)(x) for count in (1, 2))
    assert torch.equal(one, two)


def test_takes_rows_that_are_views_and_leading_dimensions(load: Load) -> None:
    product = prepare(load(), random(40, 24), None)
    wide = random(6, 50)
    assert torch.equal(product(wide[:, 3:27]), product(wide[:, 3:27].contiguous()))
    assert torch.equal(product(wide.T[:24].T), product(wide[:, :24].contiguous()))
    assert torch.equal(product(random(2, 3, 24)), product(random(2, 3, 24).view(6, 24)).view(2, 3, 40))


def test_other_shapes_and_types_are_refused(load: Load) -> None:
    product = prepare(load(), random(40, 24), None)
    with pytest.raises(ValueError, match=r"float32 \[..., 24\]"):
        product(random(2, 23))
    with pytest.raises(ValueError, match=r"float32 \[..., 24\]"):
        product(random(2, 24).bfloat16())
    with pytest.raises(ValueError, match="residual"):
        product(random(2, 24), random(2, 24))
