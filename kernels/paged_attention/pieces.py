"""How much torch attends to at one time. No torch: plans of memory count with it."""

from __future__ import annotations

from typing import Final

# Keys of one head that are gathered at one time, unless one sequence has more.
PIECE_KEYS: Final = 2**16
# Pairs of a query token and a key that have a mask at one time, unless one token sees more.
PIECE_PAIRS: Final = 2**22
_KEY_BYTES: Final = 32  # of its slot: whether it counts, where those are that do not, and its share of a page's row
_PAIR_BYTES: Final = 8  # of its mask: boolean, another one while it is made, and floating-point


def attention_bytes(longest_slots: int, head_dim: int, dtype_bytes: int, group_size: int) -> int:
    """Bound in bytes of what attention by torch allocates beside its output, for a cache in the dtype of the query and
    tables of at most ``longest_slots``. Where a CPU multiplies 16 bits in tiles, torch copies keys and values for each
    of the ``group_size`` query heads that share them."""
    num_keys = max(PIECE_KEYS, longest_slots)
    num_copies = 1 + (group_size if dtype_bytes == 2 else 0)
    return num_keys * (num_copies * 2 * head_dim * dtype_bytes + _KEY_BYTES) + _PAIR_BYTES * max(PIECE_PAIRS, num_keys)
