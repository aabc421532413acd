"""Which free block is taken next: one whose content nobody can find, before any that a prefix hit could take back."""

from __future__ import annotations

from eagleray.engine.scheduling.block_pool import BlockPool


def test_a_block_of_no_use_is_taken_before_one_never_used_and_before_cached_ones() -> None:
    cached: set[int] = set()
    pool = BlockPool(6, cached.__contains__, cached.discard)
    first, second = pool.allocate(2), pool.allocate(2)
    cached.update(first)
    pool.release(first)
    pool.release(second)
    assert pool.allocate(4) == [*second, 4, 5]
    assert cached == set(first)
    assert pool.allocate(2) == first[::-1]  # the tail of a sequence before its head
    assert not cached
