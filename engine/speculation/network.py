"""Guessing with a network that has KV of its own: a draft head, a smaller model, the target's first layers.

Slot i of that KV belongs to the request's token i, as in the target's own. A head that reads the target's features
writes it within the target's step; another network computes the tokens that have become certain after it. Then the
token just sampled is computed. What follows it is the first guess. Guesses are computed in the slots after it, where
the next step's certain tokens overwrite them. So nothing but blocks is kept from step to step, and blocks can be
cached, swapped and sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from eagleray.core.kv_layout import FeatureGroup, LayerGroup
from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.verified import VerifiedRun, VerifiedStep
from eagleray.engine.speculation.growth import GrowDrafts, Level, grow_trees
from eagleray.engine.speculation.noise import ChoiceNoise, noise_vectors, temperatures
from eagleray.engine.speculation.proposer import WritesWithTarget, drafting_runs
from eagleray.engine.speculation.tree import MAX_NODES, DraftTree
from eagleray.engine.speculation.tree import chain as chain_of
from eagleray.kernels.paged_attention.api import (
    AttentionPlan,
    chain_vectors,
    chains_of_vectors,
    plan_attention,
    tree_run,
)
from eagleray.kernels.replay.api import Replayer, StepInputs, StepIntegers
from eagleray.kernels.sampling.batch import SharedNoise
from eagleray.kernels.select import Kernels


@dataclass(frozen=True, slots=True)
class Tokens:
    """N tokens for a network to compute, of several requests one behind the other."""

    token_ids_N: Tensor  # int64
    slots_N: Tensor  # int64: position in the request, which a tree counts in depths
    features_NF: Tensor | None  # of the token before each, for networks that read them
    plan: AttentionPlan


class DraftNetwork(Protocol):
    """What guesses."""

    @property
    def first_slot(self) -> int:
        """The first slot whose KV counts: a draft head has nothing to say about a request's first token."""
        ...

    def forward(self, tokens: Tokens, kv: KVTensors) -> Tensor:
        """[N, hidden], and the tokens' KV written."""
        ...

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., V] for the token after each."""
        ...

    @property
    def target_ids_V(self) -> Tensor | None:
        """int64: the target's token ids for the network's own; None: they are the same."""
        ...

    def guessed_features(self, hidden: Tensor) -> Tensor | None:
        """What stands in for the target's features of a token that is guessed: [..., feature]."""
        ...


@dataclass(frozen=True, slots=True)
class CertainTokens:
    """Tokens of one run that have become certain, at slots ``first`` up to ``end``."""

    run: VerifiedRun
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class NetworkProposer:
    """Implements ``Proposer``."""

    network: DraftNetwork
    groups: tuple[LayerGroup | FeatureGroup, ...]
    grow: GrowDrafts = grow_trees
    chains: ChainGuesser | None = None  # None: chains are grown as trees are
    shares_target_kv: bool = False  # the network is a part of the target
    has_network: bool = True
    in_step: WritesWithTarget | None = None

    def propose(self, step: VerifiedStep) -> dict[str, DraftTree]:
        if self.in_step is not None:
            self.in_step.settle(step)
        is_up_to_date = self.shares_target_kv or self.in_step is not None
        if is_up_to_date and step.shape is None:
            return {}
        drafting = drafting_runs(step)
        start = self._start(step, drafting) if drafting or not is_up_to_date else None
        if start is None or not drafting or step.shape is None:
            return {}
        if self.chains is not None and step.shape.is_chain:
            trees = self.chains.guess(start, step.kv, drafting, step.shape.max_nodes)
        else:
            hidden_BD = start.hidden_BD if start.hidden_BD is not None else self._compute_roots(step, drafting, start)
            guesser = NetworkGuesser(self.network, step.kv, drafting, hidden_BD)
            trees = self.grow(guesser, step.shape, ChoiceNoise.of(drafting, hidden_BD.device))
        return {run.run.spec.request_id: tree for run, tree in zip(drafting, trees, strict=True)}

    def _start(self, step: VerifiedStep, drafting: Sequence[VerifiedRun]) -> ChainStart:
        """What guesses begin with. A network whose KV is written with the target's, or as a part of it, has only the
        token just sampled before it; any other computes all tokens that have become certain."""
        if self.in_step is not None:
            rows = torch.tensor([run.last_row for run in drafting], device=step.hidden_TD.device)
            return ChainStart(features_BF=step.features_TF[rows])
        return ChainStart() if self.shares_target_kv else ChainStart(hidden_BD=self._catch_up(step, drafting))

    def _catch_up(self, step: VerifiedStep, drafting: Sequence[VerifiedRun]) -> Tensor | None:
        """Compute tokens that have become certain. The hidden states of those from which guesses begin."""
        drafting_ids = {run.run.spec.request_id for run in drafting}
        spans = []
        for run in step.runs:
            first = max(run.run.start - run.run.num_deferred, self.network.first_slot)
            end = run.num_computed + (run.run.spec.request_id in drafting_ids)
            if first < end and not run.run.defers:
                spans.append(CertainTokens(run, first, end))
        if not spans:
            return None
        hidden = self.network.forward(_network_tokens(step, spans, None, self.network), step.kv)
        ends = accumulate(span.end - span.first for span in spans)
        roots = [end - 1 for end, span in zip(ends, spans, strict=True) if span.end > span.run.num_computed]
        return hidden[torch.tensor(roots, dtype=torch.int64, device=hidden.device)]

    def _compute_roots(self, step: VerifiedStep, drafting: Sequence[VerifiedRun], start: ChainStart) -> Tensor:
        spans = [CertainTokens(run, run.num_computed, run.num_known) for run in drafting]
        return self.network.forward(_network_tokens(step, spans, start.features_BF, self.network), step.kv)


def _ids_and_slots(spans: Sequence[CertainTokens], device: torch.device) -> tuple[Tensor, Tensor]:
    token_ids = [token_id for span in spans for token_id in span.run.token_ids(span.first, span.end)]
    slots = [slot for span in spans for slot in range(span.first, span.end)]
    return (
        torch.tensor(token_ids, dtype=torch.int64, device=device),
        torch.tensor(slots, dtype=torch.int64, device=device),
    )


def _network_tokens(
    step: VerifiedStep, spans: Sequence[CertainTokens], features: Tensor | None, network: DraftNetwork
) -> Tokens:
    device = step.hidden_TD.device
    return Tokens(
        *_ids_and_slots(spans, device),
        features,
        plan_attention(
            list(accumulate((span.end - span.first for span in spans), initial=0)),
            [span.first for span in spans],
            [span.run.run.block_ids for span in spans],
            step.kv.layout.block_size_tokens,
            device,
            first_key=network.first_slot,
        ),
    )


@dataclass(frozen=True, slots=True)
class ChainStart:
    """From what the guesses for B requests begin: the hidden states of each request's last known token, or, without
    them, that token itself."""

    hidden_BD: Tensor | None = None
    features_BF: Tensor | None = None  # beside the tokens, for networks that read them


@dataclass(frozen=True, slots=True)
class ChainGuesser:
    """Guesses chains for B requests: each token is what the target would choose if its logits were the network's.

    All of it is one step for the replayer. Slots and noise are known before it begins, so that nothing of a guess but
    its id is needed to go on.
    """

    network: DraftNetwork
    kernels: Kernels
    replayer: Replayer

    @classmethod
    def of(cls, network: DraftNetwork, kernels: Kernels) -> ChainGuesser:
        return cls(network, kernels, kernels.new_replayer())

    def guess(self, start: ChainStart, kv: KVTensors, runs: Sequence[VerifiedRun], length: int) -> list[DraftTree]:
        """Chains of ``length`` after each request's last known token."""
        device = kv.group(kv.layout.groups[0].name).device
        has_hidden = start.hidden_BD is not None
        block_size, block_tables = kv.layout.block_size_tokens, [run.run.block_ids for run in runs]
        first_positions = [run.num_known - (not has_hidden) for run in runs]
        integers = StepIntegers(
            device,
            *noise_vectors(runs, length),
            *(() if has_hidden else ([run.sampled[-1] for run in runs],)),
            *chain_vectors(first_positions, length - has_hidden, block_tables, block_size),
        )
        temperature_B = temperatures(runs, device)
        (token_ids_BL,) = self.replayer.run(
            partial(self._compute, start, kv, integers, temperature_B, length),
            StepInputs((temperature_B, start.hidden_BD, start.features_BF), integers=integers),
            kv,
            keep=False,
        )
        return [chain_of(token_ids) for token_ids in token_ids_BL.tolist()]

    def _compute(
        self, start: ChainStart, kv: KVTensors, integers: StepIntegers, temperature_B: Tensor, length: int
    ) -> tuple[Tensor]:
        network, hidden_BD, features = self.network, start.hidden_BD, start.features_BF
        seed_B, choice_B, positions, *of_network = integers.tensors
        token_ids_B = None if hidden_BD is not None else of_network.pop(0)
        most_steps = length - (hidden_BD is not None)
        plan = chains_of_vectors(of_network, most_steps, kv.layout.block_size_tokens, network.first_slot)
        guesses: list[Tensor] = []
        num_steps = 0
        for position_B in positions.view(length, -1).unbind():
            if token_ids_B is not None:
                tokens = Tokens(token_ids_B, plan.positions_LB[num_steps], features, plan.step(num_steps))
                hidden_BD = network.forward(tokens, kv)
                num_steps += 1
            assert hidden_BD is not None
            noise = SharedNoise(temperature_B, seed_B, choice_B, position_B)
            token_ids_B = self.kernels.guess_tokens(network.compute_logits(hidden_BD), noise, network.target_ids_V)
            features = network.guessed_features(hidden_BD)
            guesses.append(token_ids_B)
        return (reduce(self.kernels.join_columns, [guess_B[:, None] for guess_B in guesses]),)


@dataclass(slots=True)
class NetworkGuesser:
    """Implements ``Guesser`` for B requests: guesses so far lie in the slots after each request's last known token.

    The newest nodes' ancestors are computed again at each level, which costs little: the network's weights are what
    takes the time, and they are read once. Only where more ancestors come together than a run's mask has bits for are
    they read once for each part of the level.
    """

    network: DraftNetwork
    kv: KVTensors
    runs: Sequence[VerifiedRun]
    hidden_BD: Tensor  # of each request's last known token
    _token_ids_BE: list[list[int]] = field(init=False)  # of the nodes expanded so far
    _parents_BE: list[list[int]] = field(init=False)  # among them, or -1
    _features_BEF: list[Tensor] = field(init=False)  # one level each
    _hidden_BFD: Tensor = field(init=False)  # of the newest level
    _level_starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._token_ids_BE = [[] for _ in self.runs]
        self._parents_BE = [[] for _ in self.runs]
        self._features_BEF = []
        self._hidden_BFD = self.hidden_BD[:, None]
        self._level_starts = [0]

    def root_logits(self) -> Tensor:
        return self.network.compute_logits(self.hidden_BD)

    def target_ids(self, token_ids: Tensor) -> Tensor:
        ids = self.network.target_ids_V
        return token_ids if ids is None else ids[token_ids]

    def expand(self, level: Level) -> Tensor:
        num_new = level.token_ids_BF.shape[1]
        self._append(level)
        end = self._level_starts[-1]
        self._hidden_BFD = self._compute(range(end - num_new, end))
        return self.network.compute_logits(self._hidden_BFD)

    def _append(self, level: Level) -> None:
        before = self._level_starts[-2] if level.depth > 1 else -1  # the root is node -1
        for b, (token_ids, parents) in enumerate(
            zip(level.token_ids_BF.tolist(), level.parents_BF.tolist(), strict=True)
        ):
            self._token_ids_BE[b] += token_ids
            self._parents_BE[b] += [before + parent for parent in parents]
        self._level_starts.append(len(self._token_ids_BE[0]))
        guessed = self.network.guessed_features(self._hidden_BFD)
        if guessed is not None:
            index_BF = level.parents_BF if level.depth > 1 else torch.zeros_like(level.parents_BF)
            self._features_BEF.append(guessed.gather(1, index_BF[..., None].expand(-1, -1, guessed.shape[-1])))

    def _compute(self, nodes: range) -> Tensor:
        """Hidden states [B, F, D] of ``nodes`` of each tree."""
        kept_BE = [_with_ancestors(parents, nodes) for parents in self._parents_BE]
        if max(map(len, kept_BE)) > MAX_NODES:
            half = len(nodes) // 2
            return torch.cat([self._compute(nodes[:half]), self._compute(nodes[half:])], dim=1)
        hidden = self.network.forward(self._tokens(kept_BE), self.kv)
        ends = accumulate(map(len, kept_BE))  # the nodes asked for come after all their ancestors
        rows_BF = [list(range(end - len(nodes), end)) for end in ends]
        return hidden[torch.tensor(rows_BF, dtype=torch.int64, device=hidden.device)]

    def _tokens(self, kept_BE: Sequence[Sequence[int]]) -> Tokens:
        """These nodes of each tree; their parents are among them."""
        device = self.hidden_BD.device
        trees = [tree_run(_renumbered(parents, kept)) for parents, kept in zip(self._parents_BE, kept_BE, strict=True)]
        prefixes = [run.num_known for run in self.runs]
        slots = [prefix + depth for prefix, tree in zip(prefixes, trees, strict=True) for depth in tree.depths]
        token_ids = [ids[node] for ids, kept in zip(self._token_ids_BE, kept_BE, strict=True) for node in kept]
        return Tokens(
            torch.tensor(token_ids, dtype=torch.int64, device=device),
            torch.tensor(slots, dtype=torch.int64, device=device),
            self._features(kept_BE),
            plan_attention(
                list(accumulate(map(len, kept_BE), initial=0)),
                prefixes,
                [run.run.block_ids for run in self.runs],
                self.kv.layout.block_size_tokens,
                device,
                trees,
                first_key=self.network.first_slot,
            ),
        )

    def _features(self, kept_BE: Sequence[Sequence[int]]) -> Tensor | None:
        if not self._features_BEF:
            return None
        features_BEF = torch.cat(self._features_BEF, dim=1)
        rows = [b * features_BEF.shape[1] + node for b, kept in enumerate(kept_BE) for node in kept]
        return features_BEF.flatten(0, 1)[torch.tensor(rows, dtype=torch.int64, device=features_BEF.device)]


def _with_ancestors(parents: Sequence[int], nodes: range) -> list[int]:
    """In order, so that parents come before their children."""
    kept: set[int] = set()
    for node in nodes:
        while node >= 0 and node not in kept:
            kept.add(node)
            node = parents[node]
    return sorted(kept)


def _renumbered(parents: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Parents of the nodes that are kept, among them."""
    place = {node: index for index, node in enumerate(kept)}
    return [place.get(parents[node], -1) for node in kept]
