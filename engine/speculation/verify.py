"""The one rule of verification: at every node the target chooses its own token, and the walk follows the guess that is
equal to it.

What comes out is what the target would have sampled without drafts, token for token, for greedy and for seeded
sampling alike, because the choice at a position is a pure function of what stands before it. The drafter decides only
how far a step gets. (Drafter-invariant speculation: Daliri, Musco, Suresh, arXiv 2408.07978.)
"""

from __future__ import annotations

from collections.abc import Sequence

from eagleray.engine.speculation.tree import ROOT, DraftTree


def accepted_nodes(tree: DraftTree, chosen: Sequence[int]) -> list[int]:
    """Nodes along the walk from the root.

    Args:
        tree: what was guessed.
        chosen: the target's own token after the root, then after each node: 1 + len(tree).

    The step's new tokens are those of the nodes, then ``chosen`` after the last of them: one more than nodes.
    """
    accepted: list[int] = []
    here = ROOT
    for node, parent in enumerate(tree.parents):  # a parent comes before its children: one pass finds the walk
        if parent == here and tree.token_ids[node] == chosen[here + 1]:
            accepted.append(node)
            here = node
    return accepted
