"""Shape of a block, and what two workers are told when theirs differ."""

from __future__ import annotations

import math

import msgspec
import pytest

from eagleray.core.kv_layout import DTYPE_BYTES, FeatureGroup, KVLayout, LayerGroup

TARGET = LayerGroup("target", num_layers=2, num_kv_heads=3, head_dim=8, dtype="bfloat16")
DRAFT = LayerGroup("draft", num_layers=1, num_kv_heads=3, head_dim=8, dtype="float32")
FEATURE = FeatureGroup("draft", width=24, dtype="bfloat16")
LAYOUT = KVLayout(16, (TARGET, DRAFT))


def with_group(**changes: object) -> KVLayout:
    return KVLayout(16, (msgspec.structs.replace(TARGET, **changes), DRAFT))


def test_a_block_is_layer_then_key_or_value_then_head_then_token_then_dimension() -> None:
    assert TARGET.block_shape(16) == (2, 2, 3, 16, 8)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_bytes_of_a_block_are_those_of_its_shape(dtype: str) -> None:
    group = msgspec.structs.replace(TARGET, dtype=dtype)
    assert group.block_bytes(16) == math.prod(group.block_shape(16)) * DTYPE_BYTES[dtype]


def test_a_feature_group_has_one_vector_per_block_whatever_the_block_size() -> None:
    assert FEATURE.block_shape(16) == FEATURE.block_shape(64) == (24,)
    assert FEATURE.block_bytes(16) == FEATURE.block_bytes(64) == 48


def test_bytes_of_a_layout_are_those_of_all_its_groups() -> None:
    assert LAYOUT.block_bytes == 2 * 2 * 3 * 16 * 8 * 2 + 1 * 2 * 3 * 16 * 8 * 4


def test_the_digest_is_the_same_on_every_machine() -> None:
    assert KVLayout(16, (TARGET,)).digest() == "f7289cf5325cd602"


DIFFERENT = [
    (with_group(num_layers=4), "target.num_layers 2 here, 4 there"),
    (with_group(num_kv_heads=1), "target.num_kv_heads 3 here, 1 there"),
    (with_group(head_dim=64), "target.head_dim 8 here, 64 there"),
    (with_group(dtype="float16"), "target.dtype bfloat16 here, float16 there"),
    (with_group(name="other"), "target.name target here, other there"),
    (KVLayout(32, LAYOUT.groups), "block_size_tokens 16 here, 32 there"),
    (KVLayout(16, (TARGET,)), "layer groups ['target', 'draft'] here, ['target'] there"),
    (KVLayout(16, LAYOUT.groups, version=1), "layout version 2 here, 1 there"),
    (KVLayout(16, (TARGET, FEATURE)), "draft is a LayerGroup here, a FeatureGroup there"),
]


@pytest.mark.parametrize(("other", "words"), DIFFERENT, ids=[words for _, words in DIFFERENT])
def test_a_difference_names_the_field_and_both_values_and_changes_the_digest(other: KVLayout, words: str) -> None:
    assert LAYOUT.difference(other) == words
    assert LAYOUT.digest() != other.digest()


@pytest.mark.parametrize("layout", [LAYOUT, KVLayout(16, (TARGET, FEATURE))])
def test_equal_layouts_have_no_difference_and_one_digest_even_after_a_journey(layout: KVLayout) -> None:
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=KVLayout)
    assert layout.difference(travelled) is None
    assert travelled.digest() == layout.digest()
