"""What every layer of one step needs to know about the batch, worked out once per step.

Sequences with one query token (decode) are padded to a common number of blocks and computed together; longer runs
(prefill chunks) are computed one by one. Suffixes name dimensions: T query tokens, B sequences, N blocks, S key slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise

import torch

from eagleray.kernels.paged_attention.pieces import PIECE_KEYS
from eagleray.kernels.paged_attention.tree import TreeRun
from eagleray.kernels.replay.api import StepInputs, StepIntegers

# Up to this many blocks, padding a short sequence costs less than a second batched operation.
_SMALL_TABLE_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one query token each, of similar length."""

    rows_B: torch.Tensor  # int64: where their tokens stand in the query
    block_table_BN: torch.Tensor  # int64, padded with each sequence's first block
    lengths_B1: torch.Tensor  # int64: keys to attend to, the new token included
    num_slots: int  # S, padding included


@dataclass(frozen=True, slots=True)
class QueryRun:
    """Several query tokens of one sequence, consecutive unless they form a tree."""

    row_start: int  # of its first token in the query
    row_end: int
    prefix_length: int  # keys computed before the run
    block_table_N: torch.Tensor  # int64
    tree: TreeRun | None

    @property
    def length(self) -> int:
        """Keys computed when the run is."""
        return self.prefix_length + self.row_end - self.row_start


@dataclass(frozen=True, slots=True)
class SequenceTables:
    """The batch as flat int64 tensors."""

    query_starts: torch.Tensor  # [B + 1]: sequence b has rows query_starts[b] : query_starts[b + 1] of the query
    prefix_lengths: torch.Tensor  # [B]: keys computed before
    table_starts: torch.Tensor  # [B + 1]: and block_ids[table_starts[b] : table_starts[b + 1]]
    block_ids: torch.Tensor
    tree_masks: torch.Tensor | None  # [T]: of trees as in TreeRun, 0 for other rows; None: there is no tree
    tree_depths: torch.Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """One step's batch. The same plan serves every layer, whatever its head counts or window.

    What only some implementations need is worked out when one asks for it, once.
    """

    slots_T: torch.Tensor  # int64: block_id * block_size + offset of every new token
    tables: SequenceTables
    block_size_tokens: int
    trees: tuple[TreeRun | None, ...]  # per sequence; None: each token sees those before it
    first_key: int  # keys before this position are never seen

    @property
    def tensors(self) -> StepInputs:
        """All of them; ``first_key`` and ``block_size_tokens`` aside, they are what a kernel computes by."""
        tables = self.tables
        of_sequences = (tables.query_starts, tables.prefix_lengths, tables.table_starts)
        return StepInputs((self.slots_T, *of_sequences, tables.tree_masks, tables.tree_depths), (tables.block_ids,))

    @cached_property
    def decode_groups(self) -> tuple[DecodeGroup, ...]:
        """The sequences with one query token."""
        return _decode_groups(*self._sequences(), self.block_size_tokens, self.slots_T.device)

    @cached_property
    def runs(self) -> tuple[QueryRun, ...]:
        """The sequences with several query tokens."""
        starts, prefixes, tables = self._sequences()
        return tuple(
            QueryRun(start, end, prefix, torch.tensor(table, device=self.slots_T.device), tree)
            for (start, end), prefix, table, tree in zip(pairwise(starts), prefixes, tables, self.trees, strict=True)
            if end - start > 1
        )

    def _sequences(self) -> tuple[list[int], list[int], list[list[int]]]:
        block_ids = self.tables.block_ids.tolist()
        table_starts = self.tables.table_starts.tolist()
        tables = [block_ids[start:end] for start, end in pairwise(table_starts)]
        return self.tables.query_starts.tolist(), self.tables.prefix_lengths.tolist(), tables


def plan_attention(
    query_starts: Sequence[int],
    query_positions_start: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size_tokens: int,
    device: torch.device | str,
    trees: Sequence[TreeRun | None] | None = None,
    first_key: int = 0,
) -> AttentionPlan:
    """Prepare one step.

    Args:
        query_starts, query_positions_start, block_tables, block_size_tokens, trees: as in ``attention_vectors``.
        device: where the KV pool lies.
        first_key: keys before this position are never seen; a token that sees no key gets zeros.

    Raises:
        ValueError: see ``attention_vectors``.
    """
    trees = tuple(trees) if trees is not None else (None,) * (len(query_starts) - 1)
    vectors = attention_vectors(query_starts, query_positions_start, block_tables, block_size_tokens, trees)
    return plan_of_vectors(StepIntegers(device, *vectors).tensors, block_size_tokens, trees, first_key)


def attention_vectors(
    query_starts: Sequence[int],
    query_positions_start: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size_tokens: int,
    trees: Sequence[TreeRun | None],
) -> list[Sequence[int]]:
    """What the tensors of a plan hold, for ``plan_of_vectors``; the last is the only one whose length differs between
    steps that do the same.

    Args:
        query_starts: [B + 1], rising: the tokens of sequence b are rows ``query_starts[b] : query_starts[b + 1]``.
        query_positions_start: [B] tokens of each sequence computed before, the position of its first row.
        block_tables: per sequence the ids of its blocks; block i holds positions ``[i * block_size, (i + 1) *
            block_size)``. Blocks beyond the last new token are ignored.
        block_size_tokens: tokens per block.
        trees: [B] for sequences whose tokens of this step are a tree of drafts, from ``tree.tree_run``; None where
            each token follows the one before it.

    Raises:
        ValueError: a sequence has no query token, its block table does not reach its last token, or its tree has
            another number of tokens.
    """
    counts = [end - start for start, end in pairwise(query_starts)]
    tables = _needed_tables(counts, query_positions_start, block_tables, block_size_tokens)
    for index, (count, tree) in enumerate(zip(counts, trees, strict=True)):
        if tree is not None and len(tree.masks) != count:
            raise ValueError(f"sequence {index} has {count} query tokens, its tree has {len(tree.masks)}")
    return [
        _slots(counts, query_positions_start, tables, block_size_tokens),
        query_starts,
        query_positions_start,
        list(accumulate(map(len, tables), initial=0)),
        *((_tree_masks(counts, trees), _tree_depths(counts, trees)) if any(trees) else ()),
        list(chain.from_iterable(tables)),
    ]


def plan_of_vectors(
    vectors: Sequence[torch.Tensor], block_size_tokens: int, trees: tuple[TreeRun | None, ...], first_key: int = 0
) -> AttentionPlan:
    """The plan of ``attention_vectors`` as tensors; ``trees`` as there, ``first_key`` as in ``plan_attention``."""
    slots_T, starts, prefixes, table_starts, *masks_and_depths, block_ids = vectors
    tree_masks, tree_depths = masks_and_depths or (None, None)
    return AttentionPlan(
        slots_T=slots_T,
        tables=SequenceTables(starts, prefixes, table_starts, block_ids, tree_masks, tree_depths),
        block_size_tokens=block_size_tokens,
        trees=trees,
        first_key=first_key,
    )


def _needed_tables(
    counts: Sequence[int],
    query_positions_start: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size_tokens: int,
) -> list[Sequence[int]]:
    """Of each table the blocks that this step reads or writes. Raises ``ValueError``, see ``attention_vectors``."""
    tables: list[Sequence[int]] = []
    for index, (count, prefix, table) in enumerate(zip(counts, query_positions_start, block_tables, strict=True)):
        needed_blocks = -(-(prefix + count) // block_size_tokens)
        if count < 1:
            raise ValueError(f"sequence {index} has {count} query tokens; leave it out of the step")
        if len(table) < needed_blocks:
            raise ValueError(f"sequence {index} needs {needed_blocks} blocks, its table has {len(table)}")
        tables.append(table[:needed_blocks])
    return tables


@dataclass(frozen=True, slots=True)
class ChainPlan:
    """L steps of one token per sequence, each at the position after the last."""

    positions_LB: torch.Tensor  # int64
    slots_LB: torch.Tensor  # int64: block_id * block_size + offset
    query_starts: torch.Tensor  # these three as in SequenceTables
    table_starts: torch.Tensor
    block_ids: torch.Tensor
    block_size_tokens: int
    first_key: int

    def step(self, index: int) -> AttentionPlan:
        """One of the steps."""
        return AttentionPlan(
            slots_T=self.slots_LB[index],
            tables=SequenceTables(
                self.query_starts, self.positions_LB[index], self.table_starts, self.block_ids, None, None
            ),
            block_size_tokens=self.block_size_tokens,
            trees=(None,) * self.slots_LB.shape[1],
            first_key=self.first_key,
        )


def chain_vectors(
    first_positions: Sequence[int], num_steps: int, block_tables: Sequence[Sequence[int]], block_size_tokens: int
) -> list[Sequence[int]]:
    """As ``attention_vectors``, of ``num_steps`` steps, sequence b beginning at ``first_positions[b]``.

    Raises:
        ValueError: a block table does not reach the last position.
    """
    size, num_sequences = block_size_tokens, len(first_positions)
    for index, (first, table) in enumerate(zip(first_positions, block_tables, strict=True)):
        if len(table) * size < first + num_steps:
            raise ValueError(
                f"sequence {index} needs {-(-(first + num_steps) // size)} blocks, its table has {len(table)}"
            )
    positions = [first + step for step in range(num_steps) for first in first_positions]
    tables = [*block_tables] * num_steps
    return [
        positions,
        [table[at // size] * size + at % size for table, at in zip(tables, positions, strict=True)],
        range(num_sequences + 1),
        list(accumulate(map(len, block_tables), initial=0)),
        list(chain.from_iterable(block_tables)),
    ]


def chains_of_vectors(
    vectors: Sequence[torch.Tensor], num_steps: int, block_size_tokens: int, first_key: int
) -> ChainPlan:
    """The plan of ``chain_vectors`` as tensors; ``first_key`` as in ``plan_attention``."""
    positions, slots, query_starts, table_starts, block_ids = vectors
    shape = (num_steps, len(query_starts) - 1)
    return ChainPlan(
        positions.view(shape), slots.view(shape), query_starts, table_starts, block_ids, block_size_tokens, first_key
    )


def _slots(
    counts: Sequence[int], prefixes: Sequence[int], tables: Sequence[Sequence[int]], block_size_tokens: int
) -> list[int]:
    """Slot of every new token."""
    return [
        table[position // block_size_tokens] * block_size_tokens + position % block_size_tokens
        for count, prefix, table in zip(counts, prefixes, tables, strict=True)
        for position in range(prefix, prefix + count)
    ]


def _tree_masks(counts: Sequence[int], trees: Sequence[TreeRun | None]) -> list[int]:
    """As int64, where bit 63 is the sign."""
    masks = chain.from_iterable(tree.masks if tree else [0] * count for count, tree in zip(counts, trees, strict=True))
    return [mask - (mask >> 63 << 64) for mask in masks]


def _tree_depths(counts: Sequence[int], trees: Sequence[TreeRun | None]) -> list[int]:
    parts = (tree.depths if tree else [0] * count for count, tree in zip(counts, trees, strict=True))
    return list(chain.from_iterable(parts))


def _decode_groups(
    query_starts: Sequence[int],
    prefixes: Sequence[int],
    tables: Sequence[Sequence[int]],
    block_size_tokens: int,
    device: torch.device,
) -> tuple[DecodeGroup, ...]:
    """Single-token sequences by length, so that one long sequence does not make every short one gather as much; and no
    more of them than make a piece."""
    by_size: dict[int, list[int]] = {}
    for b, table in enumerate(tables):
        if query_starts[b + 1] - query_starts[b] == 1:
            by_size.setdefault(max(len(table), _SMALL_TABLE_BLOCKS).bit_length(), []).append(b)
    groups = []
    for alike in by_size.values():
        most_slots = max(len(tables[b]) for b in alike) * block_size_tokens
        at_once = max(1, PIECE_KEYS // most_slots)
        for first in range(0, len(alike), at_once):
            members = alike[first : first + at_once]
            num_blocks = max(len(tables[b]) for b in members)
            padded = [[*tables[b], *[tables[b][0]] * (num_blocks - len(tables[b]))] for b in members]
            groups.append(
                DecodeGroup(
                    rows_B=torch.tensor([query_starts[b] for b in members], device=device),
                    block_table_BN=torch.tensor(padded, device=device),
                    lengths_B1=torch.tensor([[prefixes[b] + 1] for b in members], device=device),
                    num_slots=num_blocks * block_size_tokens,
                )
            )
    return tuple(groups)
