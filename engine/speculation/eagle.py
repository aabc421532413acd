"""EAGLE's network as a drafting network: it reads the target's features.

Slot i pairs token i with the feature of token i - 1, at rotary position i - 1; slot 0 is not used. So a block depends
on no token beyond it. The feature of a block's last computed token lies in the block as well, for the slot after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.verified import VerifiedRun, VerifiedStep
from eagleray.engine.speculation.growth import GrowDrafts
from eagleray.engine.speculation.network import ChainGuesser, NetworkProposer, Tokens
from eagleray.models.draft_heads.draft_config import DRAFT_GROUP, FEATURE_GROUP, draft_groups
from eagleray.models.draft_heads.eagle import EagleHead


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
class EagleFeatures:
    """Implements ``CertainFeatures``."""

    head: EagleHead

    def before(self, step: VerifiedStep, first_slots: Sequence[int], num_slots: Sequence[int]) -> Tensor:
        rows = [row for run in step.runs for row in run.rows]
        raw = step.features_TF
        computed = self.head.project(raw[torch.tensor(rows, device=raw.device)])  # of all tokens that are certain
        carried = step.kv.group(FEATURE_GROUP)
        size = step.kv.layout.block_size_tokens
        sources: list[int] = []  # rows of `computed`, then one per run: what its first token follows
        num_computed = len(rows)
        earlier_blocks: list[int] = []
        first_row = 0
        for run, first, count in zip(step.runs, first_slots, num_slots, strict=True):
            start = run.run.start
            positions = range(first - 1, first - 1 + count)
            sources += [
                num_computed + len(earlier_blocks) if position < start else first_row + position - start
                for position in positions
            ]
            earlier_blocks.append(run.run.block_ids[max(start - 1, 0) // size])
            first_row += run.num_computed - start
        earlier = carried[torch.tensor(earlier_blocks, device=raw.device)].to(computed.dtype)
        features = torch.cat((computed, earlier))[torch.tensor(sources, dtype=torch.int64, device=raw.device)]
        self._carry(step.runs, computed, carried, size)
        return features

    def _carry(self, runs: Sequence[VerifiedRun], computed: Tensor, carried: Tensor, size: int) -> None:
        """Leave in each block the feature of the last token that has been computed in it."""
        rows: list[int] = []
        block_ids: list[int] = []
        first_row = 0
        for run in runs:
            start, end = run.run.start, run.num_computed
            for index in range(start // size, -(-end // size)):
                rows.append(first_row + min((index + 1) * size, end) - 1 - start)
                block_ids.append(run.run.block_ids[index])
            first_row += end - start
        last_rows = torch.tensor(rows, device=computed.device)
        carried[torch.tensor(block_ids, device=computed.device)] = computed[last_rows].to(carried.dtype)


def eagle_proposer(network: EagleNetwork, dtype: str, grow: GrowDrafts, chains: ChainGuesser | None) -> NetworkProposer:
    """A proposer that keeps the head's KV and features in elements of ``dtype``, a key of ``kv_layout.DTYPE_BYTES``."""
    config = network.head.config
    return NetworkProposer(
        network,
        EagleFeatures(network.head),
        groups=draft_groups(config, dtype),
        grow=grow,
        chains=chains,
        capture_layers=config.capture_layers,
    )
