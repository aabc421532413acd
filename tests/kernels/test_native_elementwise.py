from __future__ import annotations

import math

import pytest
import torch

from eagleray.kernels.activation import native as native_activation
from eagleray.kernels.activation import reference as torch_activation
from eagleray.kernels.embedding import native as native_embedding
from eagleray.kernels.embedding import reference as torch_embedding
from eagleray.kernels.features import native as native_features
from eagleray.kernels.features import reference as torch_features
from eagleray.kernels.native.library import NativeLibrary
from eagleray.kernels.norm_rope import native, reference
from eagleray.kernels.norm_rope.head_norms import HeadNorms

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCES = {torch.float32: {"rtol": 3e-6, "atol": 3e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 2e-2}}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 16, 100, 256])
def test_rms_norm_equals_the_reference(library: NativeLibrary, size: int, dtype: torch.dtype) -> None:
    weight = random(size, dtype=dtype)
    for x in (
        random(40, size, dtype=dtype),
        random(3, 5, size, dtype=dtype),
        random(9, size + 4, dtype=dtype)[:, 2:-2],
    ):
        found = native.rms_norm(library, x, weight, 1e-5)
        assert found.dtype is dtype
        torch.testing.assert_close(found, reference.rms_norm(x, weight, 1e-5), **TOLERANCES[dtype])


def test_a_row_is_normalised_alike_whatever_else_is_in_the_batch(library: NativeLibrary) -> None:
    x, weight = random(64, 300), random(300)
    assert torch.equal(native.rms_norm(library, x, weight, 1e-5)[9:10], native.rms_norm(library, x[9:10], weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 17, 704])
def test_silu_and_multiply_equals_the_reference(library: NativeLibrary, size: int, dtype: torch.dtype) -> None:
    gate_up = random(40, 2 * size, dtype=dtype) * 10
    found = native_activation.silu_and_multiply(library, gate_up)
    torch.testing.assert_close(found, torch_activation.silu_and_multiply(gate_up), **TOLERANCES[dtype])


def test_silu_of_extreme_values_is_what_it_tends_to(library: NativeLibrary) -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30, math.nan]])
    found = native_activation.silu_and_multiply(library, torch.cat((gate, torch.ones_like(gate)), dim=1))
    expected = torch_activation.silu_and_multiply(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_join_columns_equals_the_reference(library: NativeLibrary, dtype: torch.dtype) -> None:
    for left, right in ((random(5, 3, dtype=dtype), random(5, 8, dtype=dtype)), (random(2, 9)[:, 1:4], random(2, 1))):
        joined = native_activation.join_columns(library, left, right)
        assert torch.equal(joined, torch_activation.join_columns(left, right))


def test_join_columns_refuses_what_does_not_stand_side_by_side(library: NativeLibrary) -> None:
    with pytest.raises(ValueError, match="cannot join"):
        native_activation.join_columns(library, random(5, 3), random(4, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", [*DTYPES, torch.float16])
def test_gathered_rows_equal_the_reference(
    library: NativeLibrary, table_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    table = torch.cat(
        (random(9, 37) * 100, torch.tensor([0.0, -0.0, math.inf, -math.inf, 3e-7, -6e-8, 65504.0] * 37).view(7, 37))
    )
    table, rows = table.to(table_dtype), torch.tensor([15, 0, 9, 9, 12])
    found = native_embedding.gather_rows(library, table, rows, dtype)
    assert torch.equal(found, torch_embedding.gather_rows(table, rows, dtype))


@pytest.mark.parametrize("outside", [-1, 9])
def test_a_row_that_a_table_lacks_is_an_error(library: NativeLibrary, outside: int) -> None:
    with pytest.raises(IndexError, match="within the 9 rows"):
        native_embedding.gather_rows(library, random(9, 4), torch.tensor([1, outside]), torch.float32)


@pytest.mark.parametrize("pool_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_features_are_passed_as_by_the_reference(
    library: NativeLibrary, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    """Two runs, the second with guesses; both begin with a feature of the pool that the step then replaces."""
    features, pool = random(6, 20, dtype=dtype), random(9, 20, dtype=pool_dtype)
    sources, keeps = torch.tensor([~4, 0, 1, ~7, 3, 3]), torch.tensor([4, -1, 2, 7, -1, -1])
    found_pool, expected_pool = pool.clone(), pool.clone()
    found = native_features.pass_features(library, features, sources, keeps, found_pool)
    assert torch.equal(found, torch_features.pass_features(features, sources, keeps, expected_pool))
    assert torch.equal(found_pool, expected_pool)
    assert torch.equal(found[0], pool[4].to(dtype)) and torch.equal(found[4], features[3])
    assert not torch.equal(found_pool[7], pool[7])


@pytest.mark.parametrize(("source", "keep"), [(2, 0), (~9, 0), (0, 9)])
def test_features_that_are_not_there_are_an_error_and_nothing_is_written(
    library: NativeLibrary, source: int, keep: int
) -> None:
    pool = random(9, 4)
    before = pool.clone()
    with pytest.raises(IndexError, match="2 features or the 9 rows"):
        native_features.pass_features(library, random(2, 4), torch.tensor([0, source]), torch.tensor([1, keep]), pool)
    assert torch.equal(pool, before)


@pytest.mark.parametrize("half", [1, 10, 64])
@pytest.mark.parametrize(("shift", "magnitude"), [(0, 1.0), (-1, 1.25)])
def test_rotary_angles_are_exact_but_for_the_last_rounding(
    library: NativeLibrary, half: int, shift: int, magnitude: float
) -> None:
    positions = torch.tensor([0, 1, 2, 100, 4095, 131071, 1048575])
    frequencies = 1e6 ** (-torch.arange(half) / half)
    cos, sin = native.rotary_angles(library, positions, shift, frequencies, magnitude, torch.float32)
    angles = ((positions + shift)[:, None].float() * frequencies).double().repeat(1, 2)
    torch.testing.assert_close(cos.double(), angles.cos() * magnitude, rtol=2e-7, atol=1e-9)
    torch.testing.assert_close(sin.double(), angles.sin() * magnitude, rtol=2e-7, atol=1e-9)


def test_rotary_angles_equal_the_reference_in_bfloat16(library: NativeLibrary) -> None:
    positions, frequencies = torch.arange(50), 1e4 ** (-torch.arange(32) / 32)
    found = native.rotary_angles(library, positions, -1, frequencies, 1.0, torch.bfloat16)
    expected = reference.rotary_angles(positions, -1, frequencies, 1.0, torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-6)


def make_pool(num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((6, 3, 2, num_kv_heads, block_size, head_dim), math.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 64), (3, 3, 6), (8, 1, 20)])
def test_rotate_and_store_equals_the_reference(
    library: NativeLibrary, num_heads: int, num_kv_heads: int, head_dim: int, has_norms: bool, dtype: torch.dtype
) -> None:
    heads = random(5, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    angles = random(5, head_dim // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = HeadNorms(random(head_dim, dtype=dtype), random(head_dim, dtype=dtype), 1e-5) if has_norms else None
    slots = torch.tensor([23, 0, 5, 4, 9])
    ours, theirs = (make_pool(num_kv_heads, 4, head_dim, dtype) for _ in range(2))
    expected = reference.rotate_and_store(heads.clone(), cos, sin, theirs[:, 1], slots, norms)
    found = native.rotate_and_store(library, heads.clone(), cos, sin, ours[:, 1], slots, norms)
    torch.testing.assert_close(found, expected, **TOLERANCES[dtype])
    torch.testing.assert_close(ours, theirs, equal_nan=True, **TOLERANCES[dtype])


def test_rotate_and_store_converts_to_the_dtype_of_the_pool(library: NativeLibrary) -> None:
    heads, angles, slots = random(3, 8, 64), random(3, 64), torch.tensor([0, 1, 2])
    ours, theirs = (make_pool(2, 4, 64, torch.bfloat16)[:, 0] for _ in range(2))
    reference.rotate_and_store(heads.clone(), angles.cos(), angles.sin(), theirs, slots, None)
    native.rotate_and_store(library, heads.clone(), angles.cos(), angles.sin(), ours, slots, None)
    torch.testing.assert_close(ours, theirs, equal_nan=True, **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("outside", [-1, 24])
def test_a_slot_outside_the_pool_is_an_error_and_nothing_is_written(library: NativeLibrary, outside: int) -> None:
    pool = make_pool(2, 4, 64, torch.float32)
    with pytest.raises(IndexError, match="outside the pool"):
        slots = torch.tensor([3, outside])
        native.rotate_and_store(library, random(2, 8, 64), random(2, 64), random(2, 64), pool[:, 0], slots, None)
    assert bool(pool.isnan().all())


def test_tensors_of_other_shapes_types_or_strides_are_refused(library: NativeLibrary) -> None:
    pool, angles, slots = make_pool(2, 4, 64, torch.float32)[:, 0], random(2, 64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="weight is"):
        native.rms_norm(library, random(2, 8), random(9), 1e-5)
    with pytest.raises(ValueError, match="cos_T is"):
        native.rotate_and_store(library, random(2, 8, 64), angles.bfloat16(), angles, pool, slots, None)
    with pytest.raises(ValueError, match="sin_T is"):
        native.rotate_and_store(library, random(2, 8, 64), angles, random(64, 2).T, pool, slots, None)
    with pytest.raises(ValueError, match="slots_T is"):
        native.rotate_and_store(library, random(2, 8, 64), angles, angles, pool, slots[:1], None)
