"""KV blocks of one engine: who holds which, what is cached, what lies in host memory.

    token:     0 ........ 15 | 16 ....... 31 | 32 ....... 47 | 48 ...
    block:     table[0]      | table[1]      | table[2]      | table[3]
               <-- cached: found by hash --->  <-- private -->  <- partly filled

A request holds each block of its table once; a block may be in many tables when they share a prefix. Holding does not
depend on why: running requests, reservations and hand-overs all hold by request id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final

from eagleray.core.block_hash import BlockHash, CachedBlock, extend_block_hashes
from eagleray.core.errors import IntegrityError
from eagleray.core.request import Request
from eagleray.engine.scheduling.block_pool import BlockPool
from eagleray.engine.scheduling.plan import BlockCopy
from eagleray.engine.scheduling.prefix_cache import PrefixCache

_MAX_KNOWN_ROOTS: Final = 1024  # of tenants; each is asked for with every block of a request


class KVManager:
    """Allocates, shares, swaps and frees the blocks of requests.

    ``root_of(tenant_salt)`` is the parent hash of a request's first block.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size_tokens: int,
        root_of: Callable[[str], BlockHash],
        *,
        num_host_blocks: int = 0,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.block_size_tokens = block_size_tokens
        self.cache = PrefixCache()
        self.pool = BlockPool(num_blocks, self.cache.holds, self.cache.forget)
        self.host_pool = BlockPool(num_host_blocks)
        self._root_of = lru_cache(_MAX_KNOWN_ROOTS)(root_of)
        self._enable_prefix_caching = enable_prefix_caching
        self._tables: dict[str, list[int]] = {}
        self._host_tables: dict[str, list[int]] = {}

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)

    def table(self, request_id: str) -> list[int]:
        """The request's blocks, first first; empty when it holds none."""
        return self._tables.get(request_id, [])

    # ---- prefix

    def match_prefix(self, request: Request) -> list[int]:
        """Cached blocks of the request's known tokens. At least its last known token stays to be computed, since its
        logits are wanted; a request for prompt log-probabilities wants all of them and reads no cache."""
        if not self._enable_prefix_caching or request.spec.sampling.prompt_logprobs is not None:
            return []
        self._extend_hashes(request)
        return self.cache.match(request.block_hashes, limit=(request.num_tokens - 1) // self.block_size_tokens)

    def room_for(self, request: Request, num_tokens: int, matched: Iterable[int] = ()) -> int:
        """Free blocks that would be left if the request held ``num_tokens`` tokens, ``matched`` blocks among them."""
        matched = list(matched)
        held = len(self.table(request.request_id)) + len(matched)
        taken_back = sum(1 for block_id in matched if self.pool.holders(block_id) == 0)
        return self.pool.num_free - taken_back - max(0, self.blocks_for(num_tokens) - held)

    def adopt_prefix(self, request: Request, matched: list[int]) -> None:
        """Hold ``matched`` blocks as the start of the request's table; their tokens count as computed."""
        self.pool.retain(matched)
        self._tables[request.request_id] = list(matched)
        request.num_computed_tokens = request.num_complete_tokens = len(matched) * self.block_size_tokens

    # ---- growth and end

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Make the table cover ``num_tokens`` tokens; False, and nothing changed, when blocks are lacking."""
        table = self._tables.setdefault(request.request_id, [])
        lacking = -(-num_tokens // self.block_size_tokens) - len(table)
        if lacking <= 0:
            return True
        if lacking > self.pool.num_free:
            return False
        table.extend(self.pool.allocate(lacking))
        return True

    def shrink(self, request: Request, num_tokens: int) -> None:
        """Give back the blocks beyond ``num_tokens`` tokens, where nothing is kept."""
        table = self.table(request.request_id)
        kept = self.blocks_for(num_tokens)
        if kept < len(table):
            self.pool.release(table[kept:])
            del table[kept:]

    def note_computed(self, request: Request, num_computed_tokens: int, num_complete_tokens: int | None = None) -> None:
        """KV up to here has been written; that of a draft, where there is one, up to ``num_complete_tokens`` (None: as
        far). Full blocks that are complete become findable."""
        num_complete_tokens = num_computed_tokens if num_complete_tokens is None else num_complete_tokens
        first_new = request.num_complete_tokens // self.block_size_tokens
        end = num_complete_tokens // self.block_size_tokens
        request.num_computed_tokens = num_computed_tokens
        request.num_complete_tokens = num_complete_tokens
        if first_new >= end or not self._enable_prefix_caching:
            return  # no new full block, as after most tokens
        self._extend_hashes(request)
        table = self._tables[request.request_id]
        for index in range(first_new, end):
            self.cache.store(table[index], CachedBlock(request.block_hashes[0], request.block_hashes[index]))

    def free(self, request: Request) -> None:
        """Give up all blocks of the request, on the device and in host memory. Idempotent."""
        self.pool.release(self._tables.pop(request.request_id, []))
        self.host_pool.release(self._host_tables.pop(request.request_id, []))
        request.num_computed_tokens = request.num_complete_tokens = 0

    # ---- swap

    def swap_out(self, request: Request) -> list[BlockCopy] | None:
        """Move the computed blocks to host memory; None, and nothing changed, when there is no room for them."""
        needed = self.blocks_for(request.num_computed_tokens)
        if needed > self.host_pool.num_free:
            return None
        table = self._tables.pop(request.request_id)
        host_table = self.host_pool.allocate(needed)
        self._host_tables[request.request_id] = host_table
        self.pool.release(table)
        return [BlockCopy(source, target) for source, target in zip(table, host_table, strict=False)]

    def swap_in(self, request: Request) -> list[BlockCopy]:
        """Bring swapped blocks back. The caller has checked ``room_for``."""
        host_table = self._host_tables.pop(request.request_id)
        table = self.pool.allocate(len(host_table))
        self._tables[request.request_id] = table
        self.host_pool.release(host_table)
        return [BlockCopy(source, target) for source, target in zip(host_table, table, strict=True)]

    # ---- accounts

    def check_integrity(self, holders: Iterable[str]) -> None:
        """Raise ``IntegrityError`` unless exactly ``holders`` hold blocks and every count adds up."""
        strangers = (self._tables.keys() | self._host_tables.keys()) - set(holders)
        if strangers:
            raise IntegrityError(f"blocks held by requests that should hold none: {sorted(strangers)}")
        for pool, tables in ((self.pool, self._tables), (self.host_pool, self._host_tables)):
            counts = [0] * pool.num_blocks
            for table in tables.values():
                for block_id in table:
                    counts[block_id] += 1
            pool.check(counts)
        self.cache.check()

    def _extend_hashes(self, request: Request) -> None:
        if (len(request.block_hashes) + 1) * self.block_size_tokens > request.num_tokens:
            return  # no new full block, as after most tokens
        extend_block_hashes(
            request.block_hashes, self._root_of(request.spec.tenant_salt), request.token_ids, self.block_size_tokens
        )
