"""The oracle is the xxhash package: one hash, whoever computes it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import xxhash

from eagleray.kernels.kv_ops.fingerprint import copy_block, fingerprint
from eagleray.kernels.native.library import NativeLibrary

PREFIX = "0123456789abcdef"  # of a layout's digest: it shifts every stripe of the block


def random_views(sizes: Sequence[int], offset: int = 0) -> list[memoryview]:
    """Views of random bytes, each ``offset`` bytes after an allocation's start."""
    source = torch.Generator().manual_seed(sum(sizes))
    return [
        memoryview(torch.randint(0, 256, (offset + size,), dtype=torch.uint8, generator=source).numpy())[offset:]
        for size in sizes
    ]


def empty_views(sizes: Sequence[int], offset: int = 0) -> list[memoryview]:
    return [memoryview(bytearray(offset + size))[offset:] for size in sizes]


def expected(views: Sequence[memoryview], prefix: str = PREFIX) -> bytes:
    hasher = xxhash.xxh3_128(prefix.encode())
    for view in views:
        hasher.update(view)
    return hasher.digest()


# Around the ends of stripes (64 bytes), of their blocks (1024) and of chunks of copying (16384), and in pieces.
SIZES = [(225,), (240,), (300,), (1007,), (1008,), (1009,), (1024,), (1264,), (1265,), (16_384,), (16_368,), (16_369,),
         (70_001,), (100, 141), (5, 5, 5, 5, 5, 500), (64, 64, 64, 64), (48, 16, 1000, 0, 24), (16_384, 3, 32_768),
         (229_376,)]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fingerprints_are_those_of_xxhash(library: NativeLibrary, sizes: Sequence[int]) -> None:
    views = random_views(sizes)
    assert fingerprint(library, PREFIX, views) == expected(views)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 16, 64])
def test_a_copy_has_the_bytes_and_their_fingerprint(library: NativeLibrary, sizes: Sequence[int], offset: int) -> None:
    origins, targets = random_views(sizes, offset), empty_views(sizes, offset)
    assert copy_block(library, PREFIX, origins, targets) == expected(origins)
    assert [bytes(target) for target in targets] == [bytes(origin) for origin in origins]


def test_any_prefix_will_do(library: NativeLibrary) -> None:
    views = random_views((3000,))
    for length in (0, 1, 63, 64, 65, 1024):
        assert fingerprint(library, "x" * length, views) == expected(views, "x" * length)


def test_what_is_too_short_for_the_algorithm_is_refused(library: NativeLibrary) -> None:
    views = random_views((224,))
    with pytest.raises(ValueError, match="224 bytes is too short"):
        fingerprint(library, PREFIX, views)


def test_views_of_other_sizes_or_that_cannot_be_written_are_refused(library: NativeLibrary) -> None:
    with pytest.raises(ValueError, match="cannot be copied"):
        copy_block(library, PREFIX, random_views((500,)), empty_views((499,)))
    with pytest.raises(ValueError, match="read-only"):
        copy_block(library, PREFIX, random_views((500,)), [memoryview(bytes(500))])
