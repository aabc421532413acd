"""EAGLE's network as a drafting network: it reads the target's features.

Slot i pairs token i with the feature of token i - 1, at rotary position i - 1; slot 0 is not used. So a block depends
on no token beyond it. The feature of a block's last computed token lies in the block as well, for the slot after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.verified import VerifiedRun, VerifiedStep
from eagleray.engine.speculation.growth import GrowDrafts, grow_trees
from eagleray.engine.speculation.network import CertainTokens, NetworkProposer, Tokens
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

    def target_ids(self, token_ids: Tensor) -> Tensor:
        return self.head.target_ids(token_ids)

    def guessed_features(self, hidden: Tensor) -> Tensor:
        return self.head.next_feature(hidden)


@dataclass(frozen=True, slots=True)
class EagleFeatures:
    """Implements ``CertainFeatures``."""

    head: EagleHead

    def before(self, step: VerifiedStep, spans: Sequence[CertainTokens]) -> Tensor:
        raw, size = step.features_TF, step.kv.layout.block_size_tokens
        rows = [row for run in step.runs for row in run.rows]
        # Rows rise: as many as the step has are all of them.
        certain = raw if len(rows) == len(raw) else raw[torch.tensor(rows, device=raw.device)]
        computed = self.head.project(certain)
        carried = step.kv.group(FEATURE_GROUP)
        starts = accumulate((run.num_computed - run.run.start for run in step.runs), initial=0)
        first_rows = {run.run.spec.request_id: row for run, row in zip(step.runs, starts, strict=False)}
        sources: list[int] = []  # rows of `computed`, then of `earlier`
        earlier_blocks: list[int] = []
        for span in spans:
            run = span.run.run
            first_row, first = first_rows[run.spec.request_id], span.first
            if first == run.start:  # what comes before it was computed in an earlier step
                sources.append(len(rows) + len(earlier_blocks))
                earlier_blocks.append(run.block_ids[(first - 1) // size])
                first += 1
            sources += range(first_row + first - 1 - run.start, first_row + span.end - 1 - run.start)
        earlier = carried[torch.tensor(earlier_blocks, dtype=torch.int64, device=raw.device)].to(computed.dtype)
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


@dataclass(frozen=True, slots=True)
class _StoreKeysAndValues:
    """Implements ``StoreTokens``."""

    head: EagleHead

    def __call__(
        self, token_ids_N: Tensor, slots_N: Tensor, features_NF: Tensor | None, kv: KVTensors, pool_slots_N: Tensor
    ) -> None:
        assert features_NF is not None
        self.head.store_keys_and_values(token_ids_N, features_NF, slots_N, kv.group(DRAFT_GROUP), pool_slots_N)


def eagle_proposer(head: EagleHead, dtype: str, grow: GrowDrafts = grow_trees) -> NetworkProposer:
    """A proposer that keeps the head's KV and features in elements of ``dtype``, a key of ``kv_layout.DTYPE_BYTES``."""
    return NetworkProposer(
        EagleNetwork(head),
        EagleFeatures(head),
        groups=draft_groups(head.config, dtype),
        grow=grow,
        capture_layers=head.config.capture_layers,
        store=_StoreKeysAndValues(head) if head.has_one_layer else None,
    )
