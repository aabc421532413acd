"""Shape of a KV block: what models write, what transfer moves, what two workers must agree on."""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

LAYOUT_VERSION: Final = 2
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


class LayerGroup(msgspec.Struct, frozen=True, tag=True):
    """Layers of one kind whose KV lies together in a block: the target's, or a draft network's."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # a key of DTYPE_BYTES

    def block_shape(self, block_size_tokens: int) -> tuple[int, int, int, int, int]:
        """[layer, key or value, kv_head, token in block, head_dim]: a head's page is contiguous, so attention
        kernels stream it, and a whole block is one run of bytes, so transfer moves it in one piece."""
        return (self.num_layers, 2, self.num_kv_heads, block_size_tokens, self.head_dim)

    def block_bytes(self, block_size_tokens: int) -> int:
        return self.num_layers * 2 * self.num_kv_heads * block_size_tokens * self.head_dim * DTYPE_BYTES[self.dtype]


class FeatureGroup(msgspec.Struct, frozen=True, tag=True):
    """One vector per block: the target's feature of the last computed token in it. A draft head needs it for the first
    token of the next block, wherever that is computed: after a prefix hit, a swap or on another worker."""

    name: str
    width: int
    dtype: str  # a key of DTYPE_BYTES

    def block_shape(self, block_size_tokens: int) -> tuple[int]:
        return (self.width,)

    def block_bytes(self, block_size_tokens: int) -> int:
        return self.width * DTYPE_BYTES[self.dtype]


class KVLayout(msgspec.Struct, frozen=True):
    """Layout of one block over all its groups. Blocks of a group lie back to back; groups are separate regions."""

    block_size_tokens: int
    groups: tuple[LayerGroup | FeatureGroup, ...]
    version: int = LAYOUT_VERSION

    @property
    def block_bytes(self) -> int:
        return sum(group.block_bytes(self.block_size_tokens) for group in self.groups)

    def digest(self) -> str:
        """Short stable text that differs whenever two layouts differ; part of block identity and of fingerprints."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=8).hexdigest()

    def difference(self, other: KVLayout) -> str | None:
        """None when blocks can be exchanged as they are, else the first field that differs, with both values."""
        if self.version != other.version:
            return f"layout version {self.version} here, {other.version} there"
        if self.block_size_tokens != other.block_size_tokens:
            return f"block_size_tokens {self.block_size_tokens} here, {other.block_size_tokens} there"
        if len(self.groups) != len(other.groups):
            ours, theirs = ([group.name for group in layout.groups] for layout in (self, other))
            return f"layer groups {ours} here, {theirs} there"
        for mine, its in zip(self.groups, other.groups, strict=True):
            if type(mine) is not type(its):
                return f"{mine.name} is a {type(mine).__name__} here, a {type(its).__name__} there"
            for name in mine.__struct_fields__:
                if getattr(mine, name) != getattr(its, name):
                    return f"{mine.name}.{name} {getattr(mine, name)} here, {getattr(its, name)} there"
        return None
