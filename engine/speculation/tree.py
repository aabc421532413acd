"""Draft trees: guesses of what a request samples next, to be verified in one step.

    root = last known token -+- node 0 -+- node 2 --- node 4
                             |          +- node 3
                             +- node 1
    parents = (-1, -1, 0, 0, 2)

A chain is the tree in which every node has one child. No torch here: schedulers and simulators see trees too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

ROOT: Final = -1  # the parent of the first level: the request's last known token
MAX_NODES: Final = 63  # with the root, one bit each in a row of the attention mask


@dataclass(frozen=True, slots=True)
class Proposal:
    """The distribution that a guess was drawn from: the probabilities of the tokens that have any."""

    token_ids: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class DraftTree:
    """Guessed tokens; each node's parent comes before it, so that every prefix of the nodes is a tree as well."""

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]  # index of the parent node, or ``ROOT``
    proposals: tuple[Proposal, ...] = ()  # one for each node, if they were drawn; none: there was no chance in them

    def __post_init__(self) -> None:
        if len(self.proposals) not in (0, len(self.token_ids)):
            raise ValueError(f"{len(self.token_ids)} tokens and {len(self.proposals)} proposals")
        if len(self.token_ids) != len(self.parents) or len(self.parents) > MAX_NODES:
            raise ValueError(f"{len(self.token_ids)} tokens and {len(self.parents)} parents; at most {MAX_NODES} nodes")
        if any(not ROOT <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError(f"parents {self.parents}: a parent must come before its children")

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each node; children of the root have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, len(self.parents) - 1))

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to ``node``."""
        path: list[int] = []
        while node != ROOT:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def first(self, num_nodes: int) -> DraftTree:
        """The tree of the first ``num_nodes`` nodes."""
        if num_nodes >= len(self):
            return self
        return DraftTree(self.token_ids[:num_nodes], self.parents[:num_nodes], self.proposals[:num_nodes])

    def no_deeper(self, depth: int) -> DraftTree:
        """The tree of the nodes before the first one that is deeper than ``depth``."""
        return self.first(next((node for node, of_node in enumerate(self.depths) if of_node > depth), len(self)))


def chain(token_ids: Sequence[int], proposals: Sequence[Proposal] = ()) -> DraftTree:
    """One guess after the other."""
    return DraftTree(tuple(token_ids), tuple(range(-1, len(token_ids) - 1)), tuple(proposals))


@dataclass(frozen=True, slots=True)
class DraftShape:
    """How much to draft for a request.

    Level by level, the ``branching`` most probable nodes of a level are expanded by their ``branching`` best children
    each; of all nodes the ``num_nodes`` most probable ones are verified (EAGLE-2's dynamic tree, arXiv 2406.16858).
    With ``branching`` 1 that is a chain. ``paths`` fixes the tree instead, as EAGLE-1 and Medusa do: each entry is one
    node, by the rank of every step that leads to it, such as (0, 2) for the third best child of the best first guess.
    """

    depth: int
    branching: int = 1
    num_nodes: int = 0  # 0: as many as there are
    paths: tuple[tuple[int, ...], ...] = ()

    @property
    def is_chain(self) -> bool:
        return self.branching == 1

    @property
    def max_nodes(self) -> int:
        """Nodes that are verified, at most."""
        if self.paths:
            return len(self.paths)
        drafted = self.branching + (self.depth - 1) * self.branching**2
        return min(self.num_nodes or drafted, drafted, MAX_NODES)

    @property
    def num_expanded(self) -> int:
        """Nodes that a drafting network computes in one pass, at most: each takes a slot of its KV. Where a level and
        its ancestors are more than a mask has bits for, it is computed in several passes over the same slots."""
        if self.paths:
            return len({path[:-1] for path in self.paths if len(path) > 1})
        return min((self.depth - 1) * self.branching, MAX_NODES)


def fixed_tree(paths: Sequence[Sequence[int]]) -> DraftShape:
    """A fixed tree.

    Raises:
        ValueError: a path whose beginning is no node, or too many nodes.
    """
    ordered = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
    for path in ordered:
        if not path or min(path) < 0 or (len(path) > 1 and path[:-1] not in ordered):
            raise ValueError(f"path {list(path)} of the draft tree: its beginning {list(path[:-1])} is no node")
    if not ordered or len(ordered) > MAX_NODES:
        raise ValueError(f"a draft tree of {len(ordered)} nodes; it may have 1 to {MAX_NODES}")
    branching = 1 + max(rank for path in ordered for rank in path)
    return DraftShape(max(map(len, ordered)), branching, len(ordered), tuple(ordered))
