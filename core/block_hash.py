"""Identity of a KV block: a chained hash, the same in the router, on every worker and in the index.

A block's hash covers all tokens up to its end and everything that changes the bytes in it (model, revision, block
size, KV format, draft, adapter, tenant salt). So equal hash means equal KV, on every machine and after any restart.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, NewType

# bytes rather than int: a digest as it is stored in Redis, and no accidental arithmetic.
BlockHash = NewType("BlockHash", bytes)

DIGEST_BYTES: Final = 16


class CachedBlock(NamedTuple):
    """A block that a worker's cache holds, as the prefix index files it."""

    root: BlockHash  # hash of the first block of its chain
    hash: BlockHash


@dataclass(frozen=True)
class HashNamespace:
    """What a block's content depends on besides its tokens and its tenant."""

    model: str  # content identity of the checkpoint, not a path
    block_size_tokens: int
    kv_format: str  # dtype and layout version, from ``KVLayout.digest``
    draft: str = ""
    adapter: str = ""

    def root(self, tenant_salt: str = "") -> BlockHash:
        """The parent of every first block of one tenant: tenants never share blocks unless they share a salt."""
        fields = (self.model, str(self.block_size_tokens), self.kv_format, self.draft, self.adapter, tenant_salt)
        hasher = hashlib.blake2b(digest_size=DIGEST_BYTES, person=b"eagleray-root")
        for text in fields:
            encoded = text.encode()
            hasher.update(len(encoded).to_bytes(4, "little") + encoded)
        return BlockHash(hasher.digest())


def extend_block_hashes(
    hashes: list[BlockHash], root: BlockHash, token_ids: Sequence[int], block_size_tokens: int
) -> None:
    """Append the hash of every full block of ``token_ids`` that ``hashes`` does not hold yet.

    Tokens are hashed as little-endian 64-bit integers, so the result is the same on every platform.
    """
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size_tokens, len(token_ids) - block_size_tokens + 1, block_size_tokens):
        tokens = array("q", token_ids[start : start + block_size_tokens])
        parent = BlockHash(hashlib.blake2b(parent + tokens.tobytes(), digest_size=DIGEST_BYTES).digest())
        hashes.append(parent)


def hash_blocks(root: BlockHash, token_ids: Sequence[int], block_size_tokens: int) -> list[BlockHash]:
    """Hashes of all full blocks of ``token_ids``, first block first."""
    hashes: list[BlockHash] = []
    extend_block_hashes(hashes, root, token_ids, block_size_tokens)
    return hashes
