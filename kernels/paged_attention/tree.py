"""Trees of draft tokens: several continuations of one sequence, verified in one run (Miao et al., arXiv 2305.09781)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_TREE_TOKENS: Final = 64  # bits of a mask


@dataclass(frozen=True, slots=True)
class TreeRun:
    """Which of its fellows each token of a run sees. All see the whole prefix before the run.

    A token stands in the slot after the one before it, as in any run; its position, for the rotary embedding and a
    sliding window, is the length of the prefix plus its depth. Made by ``tree_run``.
    """

    masks: tuple[int, ...]  # per token; bit j: it sees the run's token j
    depths: tuple[int, ...]  # per token; 0: it follows the prefix


def tree_run(parents: Sequence[int]) -> TreeRun:
    """The tree in which each token follows ``parents[token]``, an earlier token of the run, or -1: the prefix.

    Raises:
        ValueError: no token or more than ``MAX_TREE_TOKENS``, or a parent that is no earlier token.
    """
    if not 0 < len(parents) <= MAX_TREE_TOKENS:
        raise ValueError(f"a tree of {len(parents)} tokens; verify between 1 and {MAX_TREE_TOKENS} in one run")
    masks: list[int] = []
    depths: list[int] = []
    for token, parent in enumerate(parents):
        if not -1 <= parent < token:
            raise ValueError(f"parents[{token}] is {parent}; it must be an earlier token of the run, or -1")
        masks.append((masks[parent] if parent >= 0 else 0) | 1 << token)
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return TreeRun(tuple(masks), tuple(depths))
