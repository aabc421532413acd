from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from eagleray.engine.speculation.growth import Level, grow_trees
from eagleray.engine.speculation.noise import ChoiceNoise
from eagleray.engine.speculation.tree import DraftShape, DraftTree, fixed_tree
from eagleray.kernels.sampling.api import guess_tokens
from eagleray.kernels.sampling.batch import SharedNoise

VOCAB = 7


class PathGuesser:
    """Logits that are a function of the whole path, kept per node as a network keeps its KV."""

    def __init__(self, roots: list[int]) -> None:
        self._paths: list[list[tuple[int, ...]]] = [[(root,)] for root in roots]

    def root_logits(self) -> Tensor:
        return torch.stack([path_logits(paths[0]) for paths in self._paths])

    def expand(self, level: Level) -> Tensor:
        self._paths = [
            [(*paths[parent], token) for token, parent in zip(tokens, parents, strict=True)]
            for paths, tokens, parents in zip(
                self._paths, level.token_ids_BF.tolist(), level.parents_BF.tolist(), strict=True
            )
        ]
        return torch.stack([torch.stack([path_logits(path) for path in paths]) for paths in self._paths])

    def target_ids(self, token_ids: Tensor) -> Tensor:
        return token_ids


def path_logits(path: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(hash(path) % 2**31)
    return torch.randn(VOCAB, generator=generator) * 2


def score(root: int, path: tuple[int, ...]) -> float:
    known, total = (root,), 0.0
    for token in path:
        total += float(path_logits(known).log_softmax(-1)[token])
        known = (*known, token)
    return total


def paths_of(tree: DraftTree) -> set[tuple[int, ...]]:
    return {tuple(tree.token_ids[step] for step in tree.path(node)) for node in range(len(tree))}


def test_a_chain_takes_the_best_guess_after_each_guess() -> None:
    trees = grow_trees(PathGuesser([1, 2]), DraftShape(4))
    for root, tree in zip([1, 2], trees, strict=True):
        known: tuple[int, ...] = (root,)
        for _ in range(4):
            known = (*known, int(path_logits(known).argmax()))
        assert tree.is_chain and tree.token_ids == known[1:]


@pytest.mark.parametrize(("depth", "branching", "num_nodes"), [(1, 3, 2), (2, 2, 4), (3, 3, 8), (4, 2, 5)])
def test_a_dynamic_tree_keeps_the_most_probable_of_the_expanded_paths(
    depth: int, branching: int, num_nodes: int
) -> None:
    roots = [3, 4, 5]
    trees = grow_trees(PathGuesser(roots), DraftShape(depth, branching, num_nodes))
    for root, tree in zip(roots, trees, strict=True):
        frontier: list[tuple[int, ...]] = [()]
        candidates: list[tuple[int, ...]] = []
        for _ in range(depth):
            children = [
                (*path, int(token))
                for path in frontier
                for token in path_logits((root, *path)).topk(branching).indices.tolist()
            ]
            candidates += children
            frontier = sorted(children, key=lambda path: -score(root, path))[:branching]
        expected = sorted(candidates, key=lambda path: -score(root, path))[:num_nodes]
        assert paths_of(tree) == set(expected)


def test_a_fixed_tree_has_the_ranks_of_its_paths() -> None:
    shape = fixed_tree([(0,), (1,), (0, 0), (0, 2), (1, 0), (0, 0, 1)])
    tree = grow_trees(PathGuesser([6]), shape)[0]
    for node, ranks in enumerate(shape.paths):
        known: tuple[int, ...] = (6,)
        for rank in ranks:
            known = (*known, int(path_logits(known).topk(VOCAB).indices[rank]))
        assert tuple(tree.token_ids[step] for step in tree.path(node)) == known[1:]


def test_noise_changes_what_is_guessed_at_its_depth() -> None:
    class FavourDepth:
        def scale(self, logits_BFC: Tensor) -> Tensor:
            return logits_BFC

        def perturb(self, scaled_BFC: Tensor, target_ids_BFC: Tensor, depth: int) -> Tensor:
            return scaled_BFC + 100.0 * (target_ids_BFC == depth)

    assert grow_trees(PathGuesser([1]), DraftShape(3), FavourDepth())[0].token_ids == (1, 2, 3)


def test_of_many_tokens_that_are_about_as_likely_the_one_that_noise_favours_is_guessed() -> None:
    """As a chain's guesses are: they are chosen among all tokens."""
    num_requests, vocab_size = 32, 250
    logits_BV = torch.randn(num_requests, vocab_size, generator=torch.Generator().manual_seed(1))

    class Flat:
        def root_logits(self) -> Tensor:
            return logits_BV

        def expand(self, level: Level) -> Tensor:
            return logits_BV[:, None].expand(-1, level.token_ids_BF.shape[1], -1)

        def target_ids(self, token_ids: Tensor) -> Tensor:
            return token_ids

    seed = torch.arange(num_requests)
    zero, temperature = torch.zeros_like(seed), torch.ones(num_requests)
    trees = grow_trees(Flat(), DraftShape(2, 2, 6), ChoiceNoise(temperature, temperature > 0, seed, zero, zero))
    for depth in (1, 2):
        chosen = guess_tokens(logits_BV, SharedNoise(temperature, seed, zero, zero + depth - 1), None).tolist()
        assert all(token in guesses_at(tree, depth) for tree, token in zip(trees, chosen, strict=True))


def guesses_at(tree: DraftTree, depth: int) -> set[int]:
    return {token for token, of_node in zip(tree.token_ids, tree.depths, strict=True) if of_node == depth}


def test_a_guesser_with_a_part_of_the_vocabulary_is_translated() -> None:
    class EveryOther(PathGuesser):
        def target_ids(self, token_ids: Tensor) -> Tensor:
            return 2 * token_ids

    tree = grow_trees(EveryOther([1]), DraftShape(2))[0]
    first = 2 * int(path_logits((1,)).argmax())
    assert tree.token_ids == (first, 2 * int(path_logits((1, first)).argmax()))


def test_nodes_of_equal_probability_stay_a_tree() -> None:
    class Certain:
        def root_logits(self) -> Tensor:
            return torch.tensor([[0.0, -1e9, -1e9]])

        def expand(self, level: Level) -> Tensor:
            return torch.tensor([[[0.0, -1e9, -1e9]] * level.token_ids_BF.shape[1]])

        def target_ids(self, token_ids: Tensor) -> Tensor:
            return token_ids

    for num_nodes, branching in product(range(1, 5), (1, 2)):
        tree = grow_trees(Certain(), DraftShape(4, branching, num_nodes))[0]
        assert (0,) in paths_of(tree) and len(tree) == num_nodes
