"""EAGLE's network as a drafting network: it reads the target's features.

Slot i pairs token i with the feature of token i - 1, at rotary position i - 1; slot 0 is not used. So a block depends
on no token beyond it. The feature of a block's last computed token lies in the block as well, for the slot after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.verified import VerifiedRun, VerifiedStep
from eagleray.engine.speculation.growth import GrowDrafts
from eagleray.engine.speculation.network import CertainTokens, ChainGuesser, NetworkProposer, Tokens
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
class _StepRows:
    """What a step has left for some of its runs."""

    features_TF: Tensor  # as captured from the target
    rows: dict[str, list[int]]  # by request id

    def of_few(self) -> _StepRows:
        """The same without the rows of others, where these are most: a long prompt beside a few tokens, or requests
        that have been caught up with. So what is kept stays below twice what is needed."""
        rows = [row for rows in self.rows.values() for row in rows]
        if 2 * len(rows) >= len(self.features_TF):
            return self
        ends = accumulate(map(len, self.rows.values()))
        places = {
            request_id: list(range(end - len(rows), end))
            for (request_id, rows), end in zip(self.rows.items(), ends, strict=True)
        }
        return _StepRows(self.features_TF[torch.tensor(rows, device=self.features_TF.device)], places)


class EagleFeatures:
    """Implements ``CertainFeatures``. Those of tokens that are deferred stay where their steps have left them."""

    def __init__(self, head: EagleHead) -> None:
        self._head = head
        self._kept: list[_StepRows] = []  # the oldest first

    def before(self, step: VerifiedStep, spans: Sequence[CertainTokens]) -> Tensor:
        size, device = step.kv.layout.block_size_tokens, step.features_TF.device
        runs = [run for run in step.runs if not run.run.defers]
        captured, rows_of = self._take(step, runs)
        computed = self._head.project(captured)
        carried = step.kv.group(FEATURE_GROUP)
        rows: list[int] = []  # of `computed`, then of `earlier`
        earlier_blocks: list[int] = []
        for span in spans:
            own, first = rows_of[span.run.run.spec.request_id], span.first - _begin(span.run)
            if first == 0:  # what comes before it is in its block
                rows.append(len(captured) + len(earlier_blocks))
                earlier_blocks.append(span.run.run.block_ids[(span.first - 1) // size])
                first = 1
            rows += own[first - 1 : span.end - _begin(span.run) - 1]
        earlier = carried[torch.tensor(earlier_blocks, dtype=torch.int64, device=device)].to(computed.dtype)
        features = torch.cat((computed, earlier))[torch.tensor(rows, dtype=torch.int64, device=device)]
        self._carry(runs, rows_of, computed, carried, size)
        return features

    def keep(self, step: VerifiedStep, runs: Sequence[VerifiedRun]) -> None:
        if runs:
            self._kept.append(_rows_of(step, runs).of_few())

    def forget(self, request_ids: Sequence[str]) -> None:
        for step in self._kept:
            for request_id in request_ids:
                step.rows.pop(request_id, None)
        self._kept = [step.of_few() for step in self._kept if step.rows]

    def _take(self, step: VerifiedStep, runs: Sequence[VerifiedRun]) -> tuple[Tensor, dict[str, list[int]]]:
        """(Captured features [N, feature_size], rows in them of each run's tokens: those deferred, then its own.)"""
        rows_of: dict[str, list[int]] = {run.run.spec.request_id: [] for run in runs}
        parts: list[Tensor] = []
        num_rows = 0
        for earlier in (*self._kept, _rows_of(step, runs)):
            wanted = {name: earlier.rows[name] for name in rows_of if name in earlier.rows}
            part = _StepRows(earlier.features_TF, wanted)
            if part.rows:
                part = part.of_few()
                for request_id, rows in part.rows.items():
                    rows_of[request_id] += [num_rows + row for row in rows]
                parts.append(part.features_TF)
                num_rows += len(part.features_TF)
        self.forget(list(rows_of))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), rows_of

    def _carry(
        self,
        runs: Sequence[VerifiedRun],
        rows_of: Mapping[str, Sequence[int]],
        computed: Tensor,
        carried: Tensor,
        size: int,
    ) -> None:
        """Leave in each block the feature of the last token that has been computed in it."""
        rows: list[int] = []
        block_ids: list[int] = []
        for run in runs:
            begin, end = _begin(run), run.num_computed
            own = rows_of[run.run.spec.request_id]
            for index in range(begin // size, -(-end // size)):
                rows.append(own[min((index + 1) * size, end) - 1 - begin])
                block_ids.append(run.run.block_ids[index])
        last_rows = torch.tensor(rows, device=computed.device)
        carried[torch.tensor(block_ids, device=computed.device)] = computed[last_rows].to(carried.dtype)


def _rows_of(step: VerifiedStep, runs: Sequence[VerifiedRun]) -> _StepRows:
    return _StepRows(step.features_TF, {run.run.spec.request_id: run.rows for run in runs})


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
        store=_StoreKeysAndValues(network.head) if network.head.has_one_layer else None,
    )
