"""How much torch attends to at one time. No torch: plans of memory count with it."""

from __future__ import annotations

from typing import Final

# Keys of one head that are gathered at one time, unless one sequence has more.
PIECE_KEYS: Final = 2**16
# Pairs of a query token and a key that have a mask at one time, unless one token sees more.
PIECE_PAIRS: Final = 2**22
_KEY_BYTES: Final = 24  # of its slot: whether it counts, and where those are that do not
_PAIR_BYTES: Final = 8  # of its mask: boolean, another one while it is made, and floating-point


def attention_bytes(longest_tokens: int, head_dim: int, dtype_bytes: int) -> int:
    """Bound of what attention by torch allocates beside its output, where no sequence is longer than
    ``longest_tokens``."""
    num_keys = max(PIECE_KEYS, longest_tokens)
    return num_keys * (2 * head_dim * dtype_bytes + _KEY_BYTES) + _PAIR_BYTES * max(PIECE_PAIRS, num_keys)
