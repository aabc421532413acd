from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eagleray.kv_transfer.plan import blocks_per_piece, blocks_to_announce, num_blocks_for


def test_a_block_that_is_still_being_filled_waits() -> None:
    assert blocks_to_announce(0, num_tokens=9, block_size_tokens=4, is_last=False) == range(2)


def test_the_partial_block_goes_with_the_last_announcement() -> None:
    assert blocks_to_announce(2, num_tokens=9, block_size_tokens=4, is_last=True) == range(2, 3)


def test_nothing_is_sent_of_what_the_reader_holds() -> None:
    assert not blocks_to_announce(5, num_tokens=9, block_size_tokens=4, is_last=True)


@given(st.integers(1, 7), st.integers(0, 4), st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_chunks_of_any_size_announce_every_missing_block_once(block_size: int, first: int, chunks: list[int]) -> None:
    announced: list[int] = []
    num_tokens = 0
    for number, chunk in enumerate(chunks):
        num_tokens += chunk
        next_block = announced[-1] + 1 if announced else first
        announced += blocks_to_announce(next_block, num_tokens, block_size, number == len(chunks) - 1)
    assert announced == list(range(first, num_blocks_for(num_tokens, block_size)))


def test_a_piece_holds_at_least_one_block() -> None:
    assert blocks_per_piece(piece_bytes=4096, block_bytes=10**6) == 1
    assert blocks_per_piece(piece_bytes=4096, block_bytes=1000) == 4
