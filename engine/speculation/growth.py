"""Growing draft trees level by level, for a batch of requests at once, from whatever guesses the next token.

Suffixes name dimensions: B requests, F nodes of a level that are expanded, K children considered for each, V vocabulary
of the guesser, which may be a part of the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from eagleray.engine.speculation.tree import ROOT, DraftShape, DraftTree, Proposal, chain

# Of a node that noise may bring to the front. What is less likely the target chooses as seldom as all of it together is
# likely; noise for four times as many takes three times as long.
_CANDIDATES: Final = 256
_DRAWN_CANDIDATES: Final = 64  # of a guess that is drawn: their probabilities travel with it


@dataclass(frozen=True, slots=True)
class Level:
    """Nodes of one depth that are to be expanded."""

    depth: int  # 1: children of the root
    token_ids_BF: Tensor  # int64
    parents_BF: Tensor  # int64: index among the nodes of the level before; 0 at depth 1


class Guesser(Protocol):
    """Guesses for one step's requests. Each level is asked for once, in order."""

    def root_logits(self) -> Tensor:
        """float32 [B, V] for the token after the last known one."""
        ...

    def expand(self, level: Level) -> Tensor:
        """float32 [B, F, V] for the token after each node of ``level``."""
        ...

    def target_ids(self, token_ids: Tensor) -> Tensor:
        """The target's token ids for the guesser's own."""
        ...


class Noise(Protocol):
    """The noise with which the target will choose: a guess that shares it agrees more often."""

    def scale(self, logits_BFC: Tensor) -> Tensor:
        """``logits`` of C candidates each, at the temperature of their request."""
        ...

    def perturb(self, scaled_BFC: Tensor, target_ids_BFC: Tensor, depth: int) -> Tensor:
        """``scaled`` logits as the target would rank them for nodes of ``depth``."""
        ...


# One draft for each of the guesser's requests; without noise all of them are greedy.
GrowDrafts = Callable[[Guesser, DraftShape, Noise | None], list[DraftTree]]


@dataclass(frozen=True, slots=True)
class _Ranking:
    """How children are ranked."""

    guesser: Guesser
    noise: Noise | None
    k: int

    def likeliest(self, logits_BFV: Tensor, depth: int) -> Tensor:
        """Target ids [B, F] of the best children at ``depth``."""
        if self.noise is not None:
            return self.best(logits_BFV, depth)[1][..., 0]
        return self.guesser.target_ids(logits_BFV.argmax(dim=-1))

    def best(self, logits_BFV: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """(log-probabilities, target ids) [B, F, K] of the best children at ``depth``."""
        num_candidates = self.k if self.noise is None else max(self.k, min(_CANDIDATES, logits_BFV.shape[-1]))
        values, token_ids = logits_BFV.topk(num_candidates, dim=-1)
        token_ids = self.guesser.target_ids(token_ids)
        if self.noise is None:
            return values - logits_BFV.logsumexp(dim=-1, keepdim=True), token_ids
        perturbed = self.noise.perturb(self.noise.scale(values), token_ids, depth)
        values, order = perturbed.log_softmax(dim=-1).topk(self.k, dim=-1)
        return values, token_ids.gather(-1, order)


@dataclass(frozen=True, slots=True)
class _Nodes:
    """Candidates of one depth for every request, N each."""

    token_ids_BN: Tensor
    parents_BN: Tensor  # index among all candidates of the tree, or ROOT
    scores_BN: Tensor  # log-probability of the whole path


def grow_trees(guesser: Guesser, shape: DraftShape, noise: Noise | None = None) -> list[DraftTree]:
    """One tree per request: the best paths of all candidates, or exactly ``shape.paths``."""
    ranking = _Ranking(guesser, noise, shape.branching)
    if shape.is_chain:
        return _grow_chains(guesser, shape, ranking)
    return _grow_fixed(guesser, shape, ranking) if shape.paths else _grow_dynamic(guesser, shape, ranking)


def _grow_chains(guesser: Guesser, shape: DraftShape, ranking: _Ranking) -> list[DraftTree]:
    """Every candidate is kept, so that none is scored."""
    logits_BFV = guesser.root_logits()[:, None]
    token_ids_BD: list[Tensor] = []
    for depth in range(1, shape.max_nodes + 1):
        token_ids_BD.append(ranking.likeliest(logits_BFV, depth))
        if depth < shape.max_nodes:
            logits_BFV = guesser.expand(Level(depth, token_ids_BD[-1], torch.zeros_like(token_ids_BD[-1])))
    return [chain(row) for row in torch.cat(token_ids_BD, dim=1).tolist()]


def draw_chains(guesser: Guesser, shape: DraftShape, noise: Noise | None) -> list[DraftTree]:
    """A chain per request, each guess drawn from the guesser's distribution over its best candidates, which is kept
    beside it: what the rule of rejection needs."""
    if noise is None:
        return grow_trees(guesser, shape)
    token_ids_BD, probabilities_BDC, candidates_BDC = [], [], []
    logits_BFV = guesser.root_logits()[:, None]
    for depth in range(1, shape.max_nodes + 1):
        values, candidates = logits_BFV.topk(min(_DRAWN_CANDIDATES, logits_BFV.shape[-1]), dim=-1)
        candidates = guesser.target_ids(candidates)
        scaled = noise.scale(values)
        # The largest of scaled logits with Gumbel noise is a draw from their softmax.
        drawn = noise.perturb(scaled, candidates, depth).argmax(dim=-1, keepdim=True)
        token_ids_BD.append(candidates.gather(-1, drawn)[..., 0])
        candidates_BDC.append(candidates)
        probabilities_BDC.append(scaled.softmax(dim=-1))
        if depth < shape.max_nodes:
            logits_BFV = guesser.expand(Level(depth, token_ids_BD[-1], torch.zeros_like(token_ids_BD[-1])))
    columns = (torch.cat(levels, dim=1).tolist() for levels in (token_ids_BD, candidates_BDC, probabilities_BDC))
    return [
        chain(token_ids, [Proposal(tuple(tokens), tuple(q)) for tokens, q in zip(candidates, qs, strict=True)])
        for token_ids, candidates, qs in zip(*columns, strict=True)
    ]


def _grow_dynamic(guesser: Guesser, shape: DraftShape, ranking: _Ranking) -> list[DraftTree]:
    k = shape.branching
    scores_BFK, token_ids_BFK = ranking.best(guesser.root_logits()[:, None], 1)
    levels = [_Nodes(token_ids_BFK[:, 0], torch.full_like(token_ids_BFK[:, 0], ROOT), scores_BFK[:, 0])]
    num_before = 0  # candidates of the depths before the newest
    picked_BF = torch.arange(k, device=scores_BFK.device).expand(len(scores_BFK), k)  # of the newest depth
    parents_BF = torch.zeros_like(picked_BF)
    for depth in range(1, shape.depth):
        newest = levels[-1]
        level = Level(depth, newest.token_ids_BN.gather(1, picked_BF), parents_BF)
        scores_BFK, token_ids_BFK = ranking.best(guesser.expand(level), depth + 1)
        scores_BFK = scores_BFK + newest.scores_BN.gather(1, picked_BF)[..., None]
        parents_BFK = (num_before + picked_BF)[..., None].expand_as(token_ids_BFK)
        num_before += newest.scores_BN.shape[1]
        levels.append(_Nodes(token_ids_BFK.flatten(1), parents_BFK.flatten(1), scores_BFK.flatten(1)))
        picked_BF = levels[-1].scores_BN.topk(k, dim=1).indices
        parents_BF = picked_BF // k
    return _best_trees(levels, shape.max_nodes)


def _best_trees(levels: list[_Nodes], num_nodes: int) -> list[DraftTree]:
    """A child is never more probable than its parent and comes after it, so the best nodes are a tree."""
    token_ids_BN = torch.cat([nodes.token_ids_BN for nodes in levels], dim=1)
    parents_BN = torch.cat([nodes.parents_BN for nodes in levels], dim=1)
    if num_nodes < token_ids_BN.shape[1]:
        scores_BN = torch.cat([nodes.scores_BN for nodes in levels], dim=1)
        kept_BN = _stable_best(scores_BN, num_nodes).sort(dim=1).values
        token_ids_BN, parents_BN = token_ids_BN.gather(1, kept_BN), parents_BN.gather(1, kept_BN)
        is_child_BN = parents_BN != ROOT
        parents_BN = torch.where(is_child_BN, torch.searchsorted(kept_BN, parents_BN.clamp(min=0)), ROOT)
    return [
        DraftTree(tuple(token_ids), tuple(parents))
        for token_ids, parents in zip(token_ids_BN.tolist(), parents_BN.tolist(), strict=True)
    ]


def _stable_best(scores_BN: Tensor, count: int) -> Tensor:
    """Among equals the earlier one, so that a child as probable as its parent never stays without it."""
    return scores_BN.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _grow_fixed(guesser: Guesser, shape: DraftShape, ranking: _Ranking) -> list[DraftTree]:
    node_of = {path: node for node, path in enumerate(shape.paths)}
    inner = {path[:-1] for path in shape.paths}
    _, token_ids_BFK = ranking.best(guesser.root_logits()[:, None], 1)
    columns: list[Tensor] = []  # token ids [B] per node, in the order of the paths
    frontier: list[tuple[int, ...]] = [()]
    for depth in range(1, shape.depth + 1):
        place = {path: index for index, path in enumerate(frontier)}
        level_paths = [path for path in shape.paths if len(path) == depth]
        columns += [token_ids_BFK[:, place[path[:-1]], path[-1]] for path in level_paths]
        frontier = [path for path in level_paths if path in inner]
        if frontier:
            token_ids_BF = torch.stack([columns[node_of[path]] for path in frontier], dim=1)
            parents_F = torch.tensor([place[path[:-1]] for path in frontier], device=token_ids_BF.device)
            level = Level(depth, token_ids_BF, parents_F.expand_as(token_ids_BF))
            _, token_ids_BFK = ranking.best(guesser.expand(level), depth + 1)
    parents = tuple(node_of[path[:-1]] if len(path) > 1 else ROOT for path in shape.paths)
    return [DraftTree(tuple(row), parents) for row in torch.stack(columns, dim=1).tolist()]
