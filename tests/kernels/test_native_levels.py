"""Pools of machines with AVX2 and with AVX-512 serve one request together: they must compute the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from eagleray.kernels.activation.native import silu_and_multiply
from eagleray.kernels.linear.native import NativeLinearFormat
from eagleray.kernels.native.library import NativeLibrary
from eagleray.kernels.norm_rope.native import rms_norm, rotate_and_store
from eagleray.kernels.paged_attention.native import paged_attention
from eagleray.kernels.paged_attention.plan import plan_attention

Compute = Callable[[NativeLibrary], torch.Tensor]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def linear(library: NativeLibrary) -> torch.Tensor:
    linear_format = NativeLinearFormat(library)
    return linear_format.bind(linear_format.pack(random(100, 700), random(100)))(random(20, 700))


def norm(library: NativeLibrary) -> torch.Tensor:
    return rms_norm(library, random(20, 700), random(700), 1e-5)


def gate(library: NativeLibrary) -> torch.Tensor:
    return silu_and_multiply(library, random(20, 700))


def rotation(library: NativeLibrary) -> torch.Tensor:
    pool, angles = torch.zeros(2, 2, 2, 16, 64), random(20, 64)
    query = rotate_and_store(library, random(20, 8, 64), angles.cos(), angles.sin(), pool, torch.arange(20), None)
    return torch.cat((query.flatten(), pool.flatten()))


def attention(library: NativeLibrary) -> torch.Tensor:
    plan = plan_attention([0, 30, 31], [700, 250], [range(46), range(46, 62)], 16, "cpu")
    return paged_attention(library, random(31, 4, 80), random(62, 2, 2, 16, 80), plan, 0.1, None)


@pytest.mark.parametrize("compute", [linear, norm, gate, rotation, attention])
def test_levels_agree_bit_for_bit_in_float32(
    library: NativeLibrary, load: Callable[..., NativeLibrary], compute: Compute
) -> None:
    if library.level == "portable":
        pytest.skip("this level does not fuse products with their sums")
    assert torch.equal(compute(library), compute(load()))
