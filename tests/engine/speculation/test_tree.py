from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.engine.speculation.tree import MAX_NODES, ROOT, DraftShape, DraftTree, chain, fixed_tree
from eagleray.engine.speculation.verify import accepted_nodes


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    size = draw(st.integers(0, 12))
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(size))
    return DraftTree(tuple(draw(st.integers(0, 3)) for _ in range(size)), parents)


def test_depths_and_paths_follow_the_parents() -> None:
    tree = DraftTree((5, 6, 7, 8, 9), (-1, -1, 0, 0, 2))
    assert tree.depths == (1, 1, 2, 2, 3)
    assert tree.path(4) == [0, 2, 4]
    assert not tree.is_chain and chain([1, 2, 3]).is_chain and chain([]).is_chain


def test_the_first_nodes_of_a_tree_are_a_tree() -> None:
    tree = DraftTree((5, 6, 7, 8, 9), (-1, -1, 0, 0, 2))
    assert tree.first(3) == DraftTree((5, 6, 7), (-1, -1, 0))
    assert tree.first(9) is tree


@pytest.mark.parametrize(("tokens", "parents"), [((1,), (0,)), ((1, 2), (-1,)), ((1,), (-2,))])
def test_a_parent_that_does_not_come_first_is_refused(tokens: tuple[int, ...], parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="parent"):
        DraftTree(tokens, parents)


def test_a_tree_larger_than_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=str(MAX_NODES)):
        chain(range(MAX_NODES + 1))


@given(trees(), st.lists(st.integers(0, 3), min_size=13, max_size=13))
def test_the_walk_follows_the_targets_choice_as_far_as_it_was_guessed(tree: DraftTree, chosen: list[int]) -> None:
    accepted = accepted_nodes(tree, chosen)
    here = ROOT
    for node in accepted:
        assert tree.parents[node] == here and tree.token_ids[node] == chosen[here + 1]
        here = node
    guesses = [tree.token_ids[node] for node, parent in enumerate(tree.parents) if parent == here]
    assert chosen[here + 1] not in guesses


def test_a_choice_that_nobody_guessed_gives_one_token() -> None:
    assert accepted_nodes(chain([4, 5]), [9, 5, 6]) == []


def test_shapes_count_their_nodes() -> None:
    assert DraftShape(3).max_nodes == 3 and DraftShape(3).num_expanded == 2
    assert DraftShape(3, branching=2).max_nodes == 2 + 2 * 4
    assert DraftShape(3, branching=2, num_nodes=6).max_nodes == 6
    assert DraftShape(8, branching=10).max_nodes == MAX_NODES
    assert DraftShape(8, branching=10).num_expanded == MAX_NODES


def test_a_fixed_tree_needs_the_beginning_of_every_path() -> None:
    shape = fixed_tree([(0, 1), (0,), (1,), (0, 0, 0), (0, 0)])
    assert shape.paths == ((0,), (1,), (0, 0), (0, 1), (0, 0, 0))
    assert (shape.depth, shape.branching, shape.max_nodes) == (3, 2, 5)
    with pytest.raises(ValueError, match=r"\[1, 0\].*\[1\]"):
        fixed_tree([(0,), (1, 0)])
