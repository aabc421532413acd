"""What is to be sent: pure functions of block counts. Later also which heads go where when the two sides differ."""

from __future__ import annotations

from typing import Final

# So much is hashed or handed to the kernel in less time than it takes to wake another thread for it.
QUICK_BYTES: Final = 256 * 2**10


def num_blocks_for(num_tokens: int, block_size_tokens: int) -> int:
    """Blocks that ``num_tokens`` tokens occupy, the last perhaps in part."""
    return -(-num_tokens // block_size_tokens)


def blocks_to_announce(next_block: int, num_tokens: int, block_size_tokens: int, is_last: bool) -> range:
    """Indices of the blocks that are ready and not announced yet, given ``num_tokens`` computed.

    A block that is still being filled waits until it is full, or until nothing more is computed (``is_last``): so a
    block is sent once and never changes after its fingerprint was taken.
    """
    num_ready = num_blocks_for(num_tokens, block_size_tokens) if is_last else num_tokens // block_size_tokens
    return range(next_block, max(next_block, num_ready))


def blocks_per_piece(piece_bytes: int, block_bytes: int) -> int:
    """How many blocks are moved between two looks for an abort; at least one."""
    return max(1, piece_bytes // block_bytes)
