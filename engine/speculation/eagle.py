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
class _Rows:
    """Features of consecutive tokens of a request, as the target has left them."""

    features_TF: Tensor  # of a step
    rows: list[int]


class EagleFeatures:
    """Implements ``CertainFeatures``. Those of tokens that are deferred stay where their steps have left them."""

    def __init__(self, head: EagleHead) -> None:
        self._head = head
        self._kept: dict[str, list[_Rows]] = {}  # by request id, of the tokens that it has deferred

    def before(self, step: VerifiedStep, spans: Sequence[CertainTokens]) -> Tensor:
        size, device = step.kv.layout.block_size_tokens, step.features_TF.device
        runs = [run for run in step.runs if not run.run.defers]
        computed = self._head.project(self._raw(step, runs))  # of all tokens that have become certain
        carried = step.kv.group(FEATURE_GROUP)
        first_rows: dict[str, int] = {}
        num_rows = 0
        for run in runs:
            first_rows[run.run.spec.request_id] = num_rows
            num_rows += run.num_computed - _begin(run)
        sources: list[int] = []  # rows of `computed`, then of `earlier`
        earlier_blocks: list[int] = []
        for span in spans:
            begin, first = _begin(span.run), span.first
            if first == begin:  # what comes before it is in its block
                sources.append(num_rows + len(earlier_blocks))
                earlier_blocks.append(span.run.run.block_ids[(first - 1) // size])
                first += 1
            row = first_rows[span.run.run.spec.request_id] - begin - 1  # of the token before position 0
            sources += range(row + first, row + span.end)
        earlier = carried[torch.tensor(earlier_blocks, dtype=torch.int64, device=device)].to(computed.dtype)
        features = torch.cat((computed, earlier))[torch.tensor(sources, dtype=torch.int64, device=device)]
        self._carry(runs, computed, carried, size)
        return features

    def keep(self, step: VerifiedStep, runs: Sequence[VerifiedRun]) -> None:
        features, rows_of = step.features_TF, [run.rows for run in runs]
        num_rows = sum(map(len, rows_of))
        if 2 * num_rows < len(features):  # not the whole of a long prompt for a few tokens beside it
            rows = [row for rows in rows_of for row in rows]
            features = features[torch.tensor(rows, dtype=torch.int64, device=features.device)]
            ends = accumulate(map(len, rows_of))
            rows_of = [list(range(end - len(rows), end)) for rows, end in zip(rows_of, ends, strict=True)]
        for run, rows in zip(runs, rows_of, strict=True):
            self._kept.setdefault(run.run.spec.request_id, []).append(_Rows(features, rows))

    def forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._kept.pop(request_id, None)

    def _raw(self, step: VerifiedStep, runs: Sequence[VerifiedRun]) -> Tensor:
        """The target's features of all tokens from each run's beginning on, those that were deferred included."""
        parts: list[_Rows] = []
        for run in runs:
            parts += self._kept.pop(run.run.spec.request_id, ())
            parts.append(_Rows(step.features_TF, run.rows))
        steps = {id(part.features_TF): part.features_TF for part in parts}
        offsets = dict(zip(steps, accumulate(map(len, steps.values()), initial=0), strict=False))
        rows = [offsets[id(part.features_TF)] + row for part in parts for row in part.rows]
        raw = step.features_TF if len(steps) == 1 else torch.cat(list(steps.values()))
        # Of one step, rows rise: as many as it has are all of them.
        is_whole = len(steps) == 1 and len(rows) == len(raw)
        return raw if is_whole else raw[torch.tensor(rows, dtype=torch.int64, device=raw.device)]

    def _carry(self, runs: Sequence[VerifiedRun], computed: Tensor, carried: Tensor, size: int) -> None:
        """Leave in each block the feature of the last token that has been computed in it."""
        rows: list[int] = []
        block_ids: list[int] = []
        first_row = 0
        for run in runs:
            begin, end = _begin(run), run.num_computed
            for index in range(begin // size, -(-end // size)):
                rows.append(first_row + min((index + 1) * size, end) - 1 - begin)
                block_ids.append(run.run.block_ids[index])
            first_row += end - begin
        last_rows = torch.tensor(rows, device=computed.device)
        carried[torch.tensor(block_ids, device=computed.device)] = computed[last_rows].to(carried.dtype)


def _begin(run: VerifiedRun) -> int:
    """Position of the first token that is not in the draft's KV yet."""
    return run.run.start - run.run.num_deferred


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
