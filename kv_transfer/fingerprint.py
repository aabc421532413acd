"""Fingerprint of a block: proof that the bytes read are the bytes that were announced.

XXH3 with 128 bits (https://xxhash.com): it runs at the speed of memory, so that it can stay on for every block of every
pull, and 128 bits make an accidental match impossible in practice. It defends against faults (a reused block, a torn
copy, a broken network card), not against an attacker, who would need a keyed hash.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash


def fingerprint(layout_digest: str, views: Sequence[memoryview]) -> bytes:
    """16 bytes over the layout and the bytes of one block, one view per layer group.

    ``layout_digest`` is ``KVLayout.digest()``: equal bytes under another layout are other KV.
    """
    hasher = xxhash.xxh3_128(layout_digest.encode())
    for view in views:
        hasher.update(view)
    digest: bytes = hasher.digest()
    return digest
