"""Where the intermediate results of a recorded step lie when it is replayed: those that are never needed at the same
time share their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_ROWS: Final = 128  # of a step that is recorded; with more, kernels take so long that what Python adds does not show
MAX_PROGRAMS: Final = (
    256  # kept by one replayer: sixteen requests, of which few guess, have over a hundred kinds of steps
)
PROGRAM_LAYER_BYTES: Final = 4 * 2**10  # of a program, for each layer: its calls and what differs in them
_ALIGNMENT_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Of one result: the first and the last call that touches it."""

    num_bytes: int
    first: int
    last: int


def place(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """(offset of each, bytes in all), multiples of 64. First fit, in the order in which they come to life."""
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    for index in sorted(range(len(lifetimes)), key=lambda index: lifetimes[index].first):
        new = lifetimes[index]
        placed = [other for other in placed if lifetimes[other].last >= new.first]
        offset = 0
        for other in sorted(placed, key=lambda other: offsets[other]):
            if offset + new.num_bytes <= offsets[other]:
                break
            offset = max(offset, aligned(offsets[other] + lifetimes[other].num_bytes))
        offsets[index] = offset
        placed.append(index)
    size = max((offset + life.num_bytes for offset, life in zip(offsets, lifetimes, strict=True)), default=0)
    return offsets, aligned(size)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
