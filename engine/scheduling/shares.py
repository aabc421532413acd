"""Dividing what is not enough for all."""

from __future__ import annotations

from collections.abc import Sequence


def even_shares(wanted: Sequence[int], total: int) -> list[int]:
    """At most ``total`` in all, nobody more than wanted. What one does not want is for the others."""
    shares = [0] * len(wanted)
    by_want = sorted(range(len(wanted)), key=wanted.__getitem__)
    for place, index in enumerate(by_want):
        shares[index] = min(wanted[index], total // (len(wanted) - place))
        total -= shares[index]
    return shares
