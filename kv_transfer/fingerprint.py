"""Fingerprint of a block: proof that the bytes read are the bytes that were announced.

XXH3 with 128 bits (https://xxhash.com): it runs at the speed of memory, so that it can stay on for every block of every
pull, and 128 bits make an accidental match impossible in practice. It defends against faults (a reused block, a torn
copy, a broken network card), not against an attacker, who would need a keyed hash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash


@dataclass(frozen=True, slots=True)
class BlockOps:
    """What is done with the bytes of a block, as views of its layer groups; the same results, however it is done.

    Both let other threads of this process run meanwhile.
    """

    fingerprint: Callable[[str, Sequence[memoryview]], bytes]
    copy: Callable[[str, Sequence[memoryview], Sequence[memoryview]], bytes]


def fingerprint(layout_digest: str, views: Sequence[memoryview]) -> bytes:
    """16 bytes over the layout and the bytes of one block, one view per layer group.

    ``layout_digest`` is ``KVLayout.digest()``: equal bytes under another layout are other KV.
    """
    hasher = xxhash.xxh3_128(layout_digest.encode())
    for view in views:
        hasher.update(view)
    digest: bytes = hasher.digest()
    return digest


def copy_block(layout_digest: str, origins: Sequence[memoryview], targets: Sequence[memoryview]) -> bytes:
    """Copy a block, view by view of the same sizes; returns the fingerprint of what has been copied."""
    for origin, target in zip(origins, targets, strict=True):
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(origin, np.uint8))
    return fingerprint(layout_digest, targets)


PORTABLE_BLOCK_OPS: Final = BlockOps(fingerprint, copy_block)
