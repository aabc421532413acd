"""Guessing with a network that has KV of its own: a draft head, a smaller model, the target's first layers.

Slot i of that KV belongs to the request's token i, as in the target's own. After each step the tokens that have become
certain are computed, with the target's true features where the network reads them, and one more: the token just
sampled. What follows it is the first guess. Guesses are computed in the slots after it, where the next step's certain
tokens overwrite them. So nothing but blocks is kept from step to step, and blocks can be cached, swapped and sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import accumulate, chain
from typing import Final, Protocol

import torch
from torch import Tensor

from eagleray.core.kv_layout import FeatureGroup, LayerGroup
from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.verified import VerifiedRun, VerifiedStep
from eagleray.engine.speculation.growth import GrowDrafts, Level, grow_trees
from eagleray.engine.speculation.noise import ChoiceNoise, shared_noise
from eagleray.engine.speculation.proposer import drafting_runs
from eagleray.engine.speculation.tree import DraftTree
from eagleray.engine.speculation.tree import chain as chain_of
from eagleray.kernels.paged_attention.api import AttentionPlan, ChainPlan, plan_attention, plan_chains, tree_run
from eagleray.kernels.replay.api import Replayer, StepInputs
from eagleray.kernels.sampling.batch import SharedNoise
from eagleray.kernels.select import Kernels

_COMPUTED_WITH_THE_LAST: Final = 8  # certain tokens of a run: fewer are not worth a pass of their own


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


class CertainFeatures(Protocol):
    """The target's true features, in the form in which the network reads them."""

    def before(self, step: VerifiedStep, spans: Sequence[CertainTokens]) -> Tensor | None:
        """Per token of ``spans``: the feature of the one before it, [N, feature]."""
        ...

    def keep(self, step: VerifiedStep, runs: Sequence[VerifiedRun]) -> None:
        """``runs`` are deferred: their features will be asked for in a later step, or never."""
        ...

    def forget(self, request_ids: Sequence[str]) -> None:
        """Those of these requests will never be asked for."""
        ...


class StoreTokens(Protocol):
    """Writes the KV of tokens, as ``DraftNetwork.forward`` would, but computes nothing else."""

    def __call__(
        self, token_ids_N: Tensor, slots_N: Tensor, features_NF: Tensor | None, kv: KVTensors, pool_slots_N: Tensor
    ) -> None:
        """``pool_slots_N``: where the KV of each token lies, block * block_size + offset."""
        ...


@dataclass(frozen=True, slots=True)
class NetworkProposer:
    """Implements ``Proposer``."""

    network: DraftNetwork
    features: CertainFeatures
    groups: tuple[LayerGroup | FeatureGroup, ...]
    grow: GrowDrafts = grow_trees
    chains: ChainGuesser | None = None  # None: chains are grown as trees are
    capture_layers: tuple[int, ...] = ()
    keeps_target_kv: bool = False  # the network is a part of the target: its KV of certain tokens is there already
    has_network: bool = True
    store: StoreTokens | None = None  # for tokens whose hidden states nobody needs; None: there is no short way

    def propose(self, step: VerifiedStep) -> dict[str, DraftTree]:
        drafting = drafting_runs(step)
        self.features.keep(step, [run for run in step.runs if run.run.defers])
        stored, computed = self._certain_tokens(step, drafting)
        if not stored and not computed:
            return {}
        features = self.features.before(step, [*stored, *computed])
        num_stored = sum(span.end - span.first for span in stored)
        if num_stored and self.store is not None:
            self._store(self.store, step, stored, None if features is None else features[:num_stored])
        if not computed:
            return {}
        features = None if features is None else features[num_stored:]
        hidden = self.network.forward(_network_tokens(step, computed, features, self.network), step.kv)
        if not drafting or step.shape is None:
            return {}
        ends = accumulate(span.end - span.first for span in computed)
        roots = [end - 1 for end, span in zip(ends, computed, strict=True) if span.end > span.run.num_computed]
        hidden_BD = hidden[torch.tensor(roots, device=hidden.device)]
        if self.chains is not None and step.shape.is_chain:
            trees = self.chains.guess(hidden_BD, step.kv, drafting, step.shape.max_nodes)
        else:
            guesser = NetworkGuesser(self.network, step.kv, drafting, hidden_BD)
            trees = self.grow(guesser, step.shape, ChoiceNoise.of(drafting, hidden.device))
        return {run.run.spec.request_id: tree for run, tree in zip(drafting, trees, strict=True)}

    def forget(self, request_ids: Sequence[str]) -> None:
        self.features.forget(request_ids)

    def _certain_tokens(
        self, step: VerifiedStep, drafting: Sequence[VerifiedRun]
    ) -> tuple[list[CertainTokens], list[CertainTokens]]:
        """(Those of which only the KV is wanted, those to be computed: all, or as guesses begin with them.)"""
        stored, computed = [], []
        drafting_ids = {run.run.spec.request_id for run in drafting}
        for run in step.runs:
            if run.run.defers:
                continue
            is_drafting = run.run.spec.request_id in drafting_ids
            begin = run.num_computed if self.keeps_target_kv else run.run.start - run.run.num_deferred
            first = max(begin, self.network.first_slot)
            end = run.num_computed + is_drafting
            if self.store is None or (is_drafting and end - first <= _COMPUTED_WITH_THE_LAST):
                begin = first
            else:
                begin = end - is_drafting
            if first < begin:
                stored.append(CertainTokens(run, first, begin))
            if begin < end:
                computed.append(CertainTokens(run, begin, end))
        return stored, computed

    @staticmethod
    def _store(
        store: StoreTokens, step: VerifiedStep, spans: Sequence[CertainTokens], features_NF: Tensor | None
    ) -> None:
        size, device = step.kv.layout.block_size_tokens, step.hidden_TD.device
        pool_slots = [slot for span in spans for slot in span.run.slots(range(span.first, span.end), size)]
        token_ids, slots = _ids_and_slots(spans, device)
        store(token_ids, slots, features_NF, step.kv, torch.tensor(pool_slots, device=device))


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
class ChainGuesser:
    """Guesses chains for B requests: each token is what the target would choose if its logits were the network's.

    All L guesses are one step for the replayer. Slots and noise are known before it begins, so that nothing of a guess
    but its id is needed to go on.
    """

    network: DraftNetwork
    kernels: Kernels
    replayer: Replayer

    @classmethod
    def of(cls, network: DraftNetwork, kernels: Kernels) -> ChainGuesser:
        return cls(network, kernels, kernels.new_replayer())

    def guess(self, hidden_BD: Tensor, kv: KVTensors, runs: Sequence[VerifiedRun], length: int) -> list[DraftTree]:
        """Chains of ``length``, from the hidden states of each request's last known token."""
        device = hidden_BD.device
        plan = plan_chains(
            [run.num_known for run in runs],
            length - 1,
            [run.run.block_ids for run in runs],
            kv.layout.block_size_tokens,
            device,
            self.network.first_slot,
        )
        noise = shared_noise(runs, length, device)
        tensors = plan.tensors
        of_noise = (noise.temperature, noise.seed, noise.choice, noise.position)
        (token_ids_BL,) = self.replayer.run(
            partial(self._compute, hidden_BD, kv, plan, noise),
            StepInputs((hidden_BD, *of_noise, *tensors.fixed), tensors.ragged),
            kv,
        )
        return [chain_of(token_ids) for token_ids in token_ids_BL.tolist()]

    def _compute(self, hidden_BD: Tensor, kv: KVTensors, plan: ChainPlan, noise: SharedNoise) -> tuple[Tensor]:
        network = self.network
        guesses: list[Tensor] = []
        for level, position_B in enumerate(noise.position.unbind()):
            if level > 0:
                features = network.guessed_features(hidden_BD)
                tokens = Tokens(guesses[-1], plan.positions_LB[level - 1], features, plan.step(level - 1))
                hidden_BD = network.forward(tokens, kv)
            of_level = SharedNoise(noise.temperature, noise.seed, noise.choice, position_B)
            logits = network.compute_logits(hidden_BD)
            guesses.append(self.kernels.guess_tokens(logits, of_level, network.target_ids_V))
        return (reduce(self.kernels.join_columns, [guess_B[:, None] for guess_B in guesses]),)


@dataclass(slots=True)
class NetworkGuesser:
    """Implements ``Guesser`` for B requests: guesses so far lie in the slots after each request's last known token.

    All nodes are computed again at each level, which costs little: the network's weights are what takes the time, and
    they are read once.
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
        hidden = self.network.forward(self._all(), self.kv)
        self._hidden_BFD = hidden.view(len(self.runs), -1, hidden.shape[-1])[:, -num_new:]
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

    def _all(self) -> Tokens:
        """All nodes of each tree."""
        device = self.hidden_BD.device
        trees = [tree_run(parents) for parents in self._parents_BE]
        prefixes = [run.num_known for run in self.runs]
        slots = [prefix + depth for prefix, tree in zip(prefixes, trees, strict=True) for depth in tree.depths]
        return Tokens(
            torch.tensor(list(chain.from_iterable(self._token_ids_BE)), dtype=torch.int64, device=device),
            torch.tensor(slots, dtype=torch.int64, device=device),
            torch.cat(self._features_BEF, dim=1).flatten(0, 1) if self._features_BEF else None,
            plan_attention(
                list(accumulate(map(len, self._token_ids_BE), initial=0)),
                prefixes,
                [run.run.block_ids for run in self.runs],
                self.kv.layout.block_size_tokens,
                device,
                trees,
                first_key=self.network.first_slot,
            ),
        )
