"""Who guesses: one protocol for draft heads, draft models, the target's own layers and plain text look-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eagleray.core.kv_layout import FeatureGroup, LayerGroup
from eagleray.engine.execution.batch import StepBatch
from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.verified import VerifiedRun, VerifiedStep
from eagleray.engine.scheduling.plan import ScheduledRun
from eagleray.engine.speculation.growth import GrowDrafts, Level, grow_trees
from eagleray.engine.speculation.ngram import look_up
from eagleray.engine.speculation.noise import ChoiceNoise
from eagleray.engine.speculation.tree import DraftTree, chain
from eagleray.models.decoder import Companion
from eagleray.models.draft_heads.medusa import MedusaHeads


class WritesWithTarget(Protocol):
    """Keeps a draft's KV up to date as a part of the target's own steps."""

    @property
    def group(self) -> str:
        """Of that KV; it lies in the same slots as the target's of the same tokens."""
        ...

    def vectors(self, runs: Sequence[ScheduledRun], block_size_tokens: int) -> Sequence[Sequence[int]]:
        """What it computes by in one step, beside the target's: ``StepBatch.beside``. Their lengths follow from the
        number of tokens."""
        ...

    def companion(self, batch: StepBatch, kv: KVTensors) -> Companion:
        """Of one step."""
        ...

    def settle(self, step: VerifiedStep) -> None:
        """Guesses have been verified: put right what depended on them."""
        ...


class Proposer(Protocol):
    """Guesses what comes after each step. Everything it needs besides the step lies in the request's blocks, so that it
    goes on after a prefix hit, a swap, a hand-over or a fail-over as if nothing had happened. What a run defers goes
    into the blocks with a later run that does not, before anybody else can find them."""

    @property
    def groups(self) -> tuple[LayerGroup | FeatureGroup, ...]:
        """What it keeps in a block besides the target's KV."""
        ...

    @property
    def has_network(self) -> bool:
        """It takes slots of KV for the last known token and for the guesses that it follows up."""
        ...

    @property
    def in_step(self) -> WritesWithTarget | None:
        """What it writes while the target computes; None: nothing."""
        ...

    def propose(self, step: VerifiedStep) -> dict[str, DraftTree]:
        """Write what the step computed, and guess for its runs that may draft. By request id."""
        ...


def drafting_runs(step: VerifiedStep) -> list[VerifiedRun]:
    """The runs to guess for."""
    return [run for run in step.runs if run.run.may_draft and run.sampled] if step.shape is not None else []


@dataclass(frozen=True, slots=True)
class NgramProposer:
    """Implements ``Proposer``: what followed the same passage earlier in the request."""

    min_ngram: int
    max_ngram: int

    groups: tuple[LayerGroup | FeatureGroup, ...] = ()
    has_network: bool = False
    in_step: None = None

    def propose(self, step: VerifiedStep) -> dict[str, DraftTree]:
        drafts = {}
        for run in drafting_runs(step):
            found = look_up(
                run.token_ids(0, run.num_known), step.shape.depth if step.shape else 0, self.min_ngram, self.max_ngram
            )
            if found:
                drafts[run.run.spec.request_id] = chain(found)
        return drafts


@dataclass(frozen=True, slots=True)
class MedusaProposer:
    """Implements ``Proposer``: one head per token ahead, each from the target's last hidden state (Cai et al., arXiv
    2401.10774)."""

    heads: MedusaHeads
    grow: GrowDrafts = grow_trees

    groups: tuple[LayerGroup | FeatureGroup, ...] = ()
    has_network: bool = False
    in_step: None = None

    def propose(self, step: VerifiedStep) -> dict[str, DraftTree]:
        runs = drafting_runs(step)
        if not runs or step.shape is None:
            return {}
        last_rows = torch.tensor([run.last_row for run in runs], device=step.hidden_TD.device)
        guesser = _HeadGuesser(self.heads.forward(step.hidden_TD[last_rows]))
        trees = self.grow(guesser, step.shape, ChoiceNoise.of(runs, step.hidden_TD.device))
        return {run.run.spec.request_id: tree for run, tree in zip(runs, trees, strict=True)}


@dataclass(frozen=True, slots=True)
class _HeadGuesser:
    """Implements ``Guesser``: what a head says does not depend on the guesses before its token."""

    logits_BHV: Tensor  # one head per depth

    def root_logits(self) -> Tensor:
        return self.logits_BHV[:, 0]

    def expand(self, level: Level) -> Tensor:
        num_nodes = level.token_ids_BF.shape[1]
        return self.logits_BHV[:, level.depth, None].expand(-1, num_nodes, -1)

    def target_ids(self, token_ids: Tensor) -> Tensor:
        return token_ids
