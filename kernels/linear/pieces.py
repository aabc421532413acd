"""How much of a quantised layer torch turns into floating-point numbers at one time. No torch: plans count with it."""

from __future__ import annotations

from typing import Final

PIECE_WEIGHTS: Final = 2**21
PIECE_WEIGHT_BYTES: Final = 16  # two copies of up to 8 bytes
