"""EAGLE's network as a drafting network: it reads the target's features.

Slot i pairs token i with the feature of token i - 1, at rotary position i - 1; slot 0 is not used. So a block depends
on no token beyond it. The feature of a block's last computed token lies in the block as well, for the slot after it.

All of it is written in the step that computes the target's KV, and as a part of that: whether anybody guesses or not,
the head's KV is never behind. Guesses that are verified are taken to be true; those that are not are overwritten.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eagleray.engine.execution.batch import StepBatch
from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.verified import VerifiedStep
from eagleray.engine.scheduling.plan import ScheduledRun
from eagleray.engine.speculation.growth import GrowDrafts
from eagleray.engine.speculation.network import ChainGuesser, NetworkProposer, Tokens
from eagleray.kernels.select import Kernels
from eagleray.models.draft_heads.draft_config import DRAFT_GROUP, FEATURE_GROUP, draft_groups
from eagleray.models.draft_heads.eagle import EagleHead

_NO_BLOCK = -1


@dataclass(frozen=True, slots=True)
class EagleNetwork:
    """Implements ``DraftNetwork``."""

    head: EagleHead
    first_slot: int = 1

    def forward(self, tokens: Tokens, kv: KVTensors) -> Tensor:
        assert tokens.features_NF is not None
        return self.head.forward(
            tokens.token_ids_N, tokens.features_NF, tokens.slots_N, kv.group(DRAFT_GROUP), tokens.plan
        )

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.head.compute_logits(hidden)

    @property
    def target_ids_V(self) -> Tensor | None:
        return self.head.target_ids_D

    def guessed_features(self, hidden: Tensor) -> Tensor:
        return self.head.next_feature(hidden)


@dataclass(frozen=True, slots=True)
class _HeadInStep:
    """Implements ``Companion``: the head's KV of a step's tokens, and their features, [T, hidden]."""

    of: EagleInStep
    kv: KVTensors
    batch: StepBatch  # beside: sources and keeps as in ``pass_features``, with a row per block

    @property
    def capture_layers(self) -> tuple[int, ...]:
        return self.of.network.head.config.capture_layers

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.batch.beside

    @property
    def identity(self) -> Hashable:
        return self.of, self.kv

    def compute(self, streams: Tensor) -> Tensor:
        network, batch = self.of.network, self.batch
        features = network.head.project(streams)
        carried = self.kv.group(FEATURE_GROUP)
        sources_T, keeps_T = batch.beside
        previous = self.of.kernels.pass_features(features, sources_T, keeps_T, carried)
        plan = replace(batch.attention, first_key=network.first_slot)
        network.head.write(batch.input_ids, previous, batch.positions, self.kv.group(self.of.group), plan)
        return features


@dataclass(frozen=True, slots=True, eq=False)  # compared in the key of each step
class EagleInStep:
    """Implements ``WritesWithTarget``."""

    network: EagleNetwork
    kernels: Kernels
    group: str = DRAFT_GROUP

    def vectors(self, runs: Sequence[ScheduledRun], block_size_tokens: int) -> tuple[list[int], list[int]]:
        sources: list[int] = []
        keeps: list[int] = []
        size = block_size_tokens
        for run in runs:
            first, start, blocks = len(sources), run.start, run.block_ids
            # Nothing comes before a request's first token. Its slot is not used, whatever is written there.
            sources.append(~blocks[(start - 1) // size] if start else first)
            if run.num_tokens > 1:
                sources += range(first, first + run.num_tokens - 1)
                keeps += [blocks[at // size] if (at + 1) % size == 0 else _NO_BLOCK for at in range(start, run.end - 1)]
            keeps.append(blocks[(run.end - 1) // size])
            if run.draft is not None:
                sources += [first + run.num_tokens + parent for parent in run.draft.parents]
                keeps += [_NO_BLOCK] * len(run.draft)
        return sources, keeps

    def companion(self, batch: StepBatch, kv: KVTensors) -> _HeadInStep:
        return _HeadInStep(self, kv, batch)

    def settle(self, step: VerifiedStep) -> None:
        """Leave in each block the feature of its last token, now that guesses are known to be true."""
        size = step.kv.layout.block_size_tokens
        rows: list[int] = []
        blocks: list[int] = []
        for run in step.runs:
            if run.accepted:
                end, num_accepted = run.run.end, len(run.accepted)
                for index in range(end // size, -(-(end + num_accepted) // size)):
                    last = min((index + 1) * size, end + num_accepted) - 1
                    rows.append(run.first_row + run.run.num_tokens + run.accepted[last - end])
                    blocks.append(run.run.block_ids[index])
        if rows:
            carried = step.kv.group(FEATURE_GROUP)
            features = step.features_TF[torch.tensor(rows, device=carried.device)]
            carried[torch.tensor(blocks, device=carried.device)] = features.to(carried.dtype)


def eagle_proposer(
    network: EagleNetwork, kernels: Kernels, dtype: str, grow: GrowDrafts, chains: ChainGuesser | None
) -> NetworkProposer:
    """A proposer that keeps the head's KV and features in elements of ``dtype``, a key of ``kv_layout.DTYPE_BYTES``."""
    return NetworkProposer(
        network,
        groups=draft_groups(network.head.config, dtype),
        grow=grow,
        chains=chains,
        in_step=EagleInStep(network, kernels),
    )
