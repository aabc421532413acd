"""Rows of large steps lie apart: operations between linear layers take and give them, with the same bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from eagleray.kernels.activation import native as activation
from eagleray.kernels.features import native as features
from eagleray.kernels.linear.panels import PanelLinearFormat, PanelWeights
from eagleray.kernels.native.arguments import new_rows
from eagleray.kernels.native.library import NativeLibrary
from eagleray.kernels.norm_rope import native as norm_rope
from eagleray.kernels.norm_rope.head_norms import HeadNorms
from eagleray.kernels.sampling import native as sampling
from eagleray.kernels.sampling.batch import SharedNoise

ROWS, SIZE = 130, 512
TYPES = (torch.float32, torch.bfloat16)


def apart(close: Tensor) -> Tensor:
    rows = new_rows(*close.shape, close.dtype)
    assert rows.stride(0) > rows.shape[1]
    return rows.copy_(close)


def random_rows(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(ROWS, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_small_step_or_an_odd_size_has_rows_side_by_side() -> None:
    for num_rows, size in ((128, SIZE), (ROWS, SIZE + 8)):
        assert new_rows(num_rows, size, torch.float32).is_contiguous()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4", "w8a8"])
def test_products(library: NativeLibrary, weights: PanelWeights, dtype: torch.dtype) -> None:
    linear_format = PanelLinearFormat(library, weights)
    product = linear_format.bind(linear_format.pack(random_rows(SIZE, dtype, 1)[:128], torch.ones(128)))
    x, residual = random_rows(SIZE, dtype), random_rows(128, torch.float32, 2)
    few = torch.cat([product(x[:64], residual[:64], torch.float32), product(x[64:], residual[64:], torch.float32)])
    residual_apart = torch.empty(ROWS, 144)[:, :128].copy_(residual)
    assert torch.equal(product(apart(x), residual_apart, torch.float32), few)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_stands_between_products(library: NativeLibrary, dtype: torch.dtype) -> None:
    weight = torch.rand(SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = random_rows(SIZE, dtype)
    for operation in (
        partial(norm_rope.rms_norm, library, weight=weight, eps=1e-6),
        partial(activation.silu_and_multiply, library),
        lambda rows: activation.join_columns(library, rows, rows),
    ):
        assert torch.equal(operation(apart(x)), operation(x))


@pytest.mark.parametrize("dtype", TYPES)
def test_heads_are_turned_where_they_lie(library: NativeLibrary, dtype: torch.dtype) -> None:
    angles = torch.rand(ROWS, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    norms = HeadNorms(torch.ones(64, dtype=dtype), torch.ones(64, dtype=dtype), 1e-6)
    results = []
    for rows in (random_rows(SIZE, dtype), apart(random_rows(SIZE, dtype))):
        pool = torch.zeros(10, 2, 2, 16, 64, dtype=dtype)
        heads = rows.view(ROWS, 8, 64)
        query = norm_rope.rotate_and_store(library, heads, angles, angles, pool, torch.arange(ROWS), norms)
        assert query.data_ptr() == rows.data_ptr()
        results.append((query.clone(), pool))
    assert all(map(torch.equal, *results))


def test_features_and_logits(library: NativeLibrary) -> None:
    rows, pool = random_rows(SIZE, torch.float32), torch.zeros(4, SIZE)
    sources, keeps = torch.arange(ROWS) - 1, torch.full((ROWS,), -1)
    passed = [features.pass_features(library, each, sources, keeps, pool) for each in (rows, apart(rows))]
    assert torch.equal(*passed)
    numbers = torch.arange(ROWS)
    noise = SharedNoise(torch.full((ROWS,), 0.7), numbers, numbers, numbers)
    guessed = [sampling.guess_tokens(library, each, noise, None) for each in (rows, apart(rows))]
    assert torch.equal(*guessed)
