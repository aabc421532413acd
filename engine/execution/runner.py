"""One step on the model: swap copies, forward, sampling and verification, guesses for the next step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from eagleray.core.clock import Clock
from eagleray.core.messages import TokenLogprobs
from eagleray.engine.execution.batch import PromptLogprobRows, StepBatch, build_batch, prompt_logprob_rows
from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.memory_plan import SCORED_ROWS
from eagleray.engine.execution.sampler import (
    Choice,
    TokenRule,
    build_sampling_batch,
    choices_of,
    choose_tokens,
    score_tokens,
)
from eagleray.engine.execution.verified import VerifiedRun, VerifiedStep
from eagleray.engine.scheduling.plan import BlockCopy, SampledToken, ScheduledRun, StepPlan, StepResult
from eagleray.engine.speculation.proposer import Proposer
from eagleray.engine.speculation.tree import DraftTree
from eagleray.engine.speculation.verify import accepted_nodes
from eagleray.kernels.kv_ops.api import copy_tokens
from eagleray.kernels.replay.api import StepInputs
from eagleray.kernels.sampling.batch import SamplingBatch
from eagleray.kernels.select import Kernels
from eagleray.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class _Asked:
    """The R next tokens that a step is to choose."""

    choices: Sequence[Choice]
    rows: Sequence[int]  # [R], in the step's batch
    bounds: Sequence[int]  # per run and at the end: the first of its choices
    sampling: SamplingBatch


@dataclass(frozen=True, slots=True)
class _Computed:
    """What one program computes. T rows as in the step's batch."""

    hidden_TD: Tensor
    features_TF: Tensor  # what the draft's companion makes of the step; without one the hidden states
    logits_RV: Tensor | None = None  # these two where each row has a token to choose: R = T
    token_ids_R: Tensor | None = None  # and nothing is asked for but the best


class ModelRunner:
    """Computes steps on one model and its KV pools, in the calling thread. Not thread-safe."""

    def __init__(
        self,
        model: Decoder,
        kv: KVTensors,
        host_kv: KVTensors | None,
        device: str,
        kernels: Kernels,
        clock: Clock,
        proposer: Proposer | None = None,
        choose: TokenRule | None = None,  # none: the target's own token
    ) -> None:
        self._model = model
        self._kv = kv
        self._host_kv = host_kv
        self._device = device
        self._kernels = kernels
        self._clock = clock
        self._proposer = proposer
        self._choose = choose or partial(choose_tokens, kernels.sample_tokens)
        self._in_step = None if proposer is None else proposer.in_step
        self._replayer = kernels.new_replayer()

    @torch.inference_mode()
    def run(self, plan: StepPlan, on_compute: Callable[[], None] | None = None) -> StepResult:
        """Do the copies of ``plan``, compute its runs as one batch, and guess what comes after them. ``on_compute`` is
        called when all is prepared: small steps then need the interpreter no more until they are verified."""
        start_s = self._clock.now_s()
        self._swap(plan)
        if not plan.runs:
            return StepResult()
        block_size = self._kv.layout.block_size_tokens
        beside = () if self._in_step is None else self._in_step.vectors(plan.runs, block_size)
        batch = build_batch(plan.runs, block_size, self._device, beside)
        asked = self._ask(plan.runs, batch.run_starts)
        if on_compute is not None:
            on_compute()
        computed = self._compute(batch, asked)
        hidden = computed.hidden_TD
        verified, logprobs = self._verify(computed, plan.runs, batch.run_starts, asked)
        self._keep_accepted(verified)
        wanted = prompt_logprob_rows(plan.runs, batch.run_starts)
        prompt_logprobs = {rows.request_id: self._score_prompt(hidden, rows) for rows in wanted}
        verified_s = self._clock.now_s()
        drafts: dict[str, DraftTree] = {}
        if self._proposer is not None:
            drafts = self._proposer.propose(VerifiedStep(verified, hidden, computed.features_TF, self._kv, plan.shape))
        return StepResult(
            sampled={
                run.run.spec.request_id: tuple(map(SampledToken, run.sampled, scores))
                for run, scores in zip(verified, logprobs, strict=True)
                if run.sampled
            },
            prompt_logprobs=prompt_logprobs,
            drafts=drafts,
            verify_s=verified_s - start_s,
            draft_s=self._clock.now_s() - verified_s,
        )

    def _ask(self, runs: Sequence[ScheduledRun], run_starts: Sequence[int]) -> _Asked:
        """Before anything is computed: after a step the interpreter is cold."""
        choices = [choices_of(run) if run.samples else [] for run in runs]
        rows = [
            start + run.num_tokens - 1 + node
            for run, start, own in zip(runs, run_starts, choices, strict=True)
            for node in range(len(own))
        ]
        flat = [choice for own in choices for choice in own]
        sampling = build_sampling_batch(flat, self._model.config.vocab_size, self._device)
        return _Asked(flat, rows, list(accumulate(map(len, choices), initial=0)), sampling)

    def _compute(self, batch: StepBatch, asked: _Asked) -> _Computed:
        """As much as can be replayed as one program: hidden states, what the draft's companion makes of the step, and,
        where each row has a token to choose, logits and the best tokens."""
        samples_all = len(asked.rows) == batch.num_rows
        takes_best = samples_all and asked.sampling.is_greedy
        variant = (samples_all, takes_best)
        results = self._replayer.run(
            partial(self._compute_batch, batch, *variant), StepInputs(integers=batch.integers), variant, keep=False
        )
        return _Computed(*results)

    def _compute_batch(self, batch: StepBatch, samples_all: bool, takes_best: bool) -> tuple[Tensor, ...]:
        model, inputs = self._model, (batch.input_ids, batch.positions, self._target_pool, batch.attention)
        if self._in_step is None:
            hidden = features = model.forward(*inputs)
        else:
            hidden, features = model.forward_with(*inputs, self._in_step.companion(batch, self._kv))
        if not samples_all:
            return hidden, features
        logits = model.compute_logits(hidden)
        if not takes_best:
            return hidden, features, logits
        return hidden, features, logits, self._kernels.sample_tokens(logits, SamplingBatch())

    @property
    def _target_pool(self) -> Tensor:
        return self._kv.group(self._kv.layout.groups[0].name)

    def _swap(self, plan: StepPlan) -> None:
        if not (plan.swap_out or plan.swap_in):
            return
        if self._host_kv is None:
            raise ValueError("a plan that swaps needs host blocks: engine.num_host_blocks is 0")
        for group in self._kv.layout.groups:
            device_pool, host_pool = self._kv.group(group.name), self._host_kv.group(group.name)
            self._kernels.copy_blocks(device_pool, host_pool, _pairs(plan.swap_out))
            self._kernels.copy_blocks(host_pool, device_pool, _pairs(plan.swap_in))

    def _verify(
        self, computed: _Computed, runs: Sequence[ScheduledRun], run_starts: Sequence[int], asked: _Asked
    ) -> tuple[tuple[VerifiedRun, ...], list[Sequence[TokenLogprobs | None]]]:
        """Choose the next token after every run that samples and after each of its guesses, then walk the guesses.
        (runs, log-probabilities of what each sampled)."""
        rows, bounds = asked.rows, asked.bounds
        if not rows:
            return tuple(map(VerifiedRun, runs, run_starts)), [()] * len(runs)
        logits, token_ids = computed.logits_RV, computed.token_ids_R
        if logits is None:
            logits = self._model.compute_logits(computed.hidden_TD[torch.tensor(rows, device=self._device)])
        if token_ids is None:
            token_ids = self._choose(logits, asked.sampling, asked.choices)
        chosen = token_ids.tolist()
        verified = tuple(
            _walk(run, start, chosen[first:end])
            for run, start, (first, end) in zip(runs, run_starts, pairwise(bounds), strict=True)
        )
        return verified, self._score(logits, token_ids, verified, bounds)

    def _score(
        self, logits: Tensor, token_ids: Tensor, verified: Sequence[VerifiedRun], bounds: Sequence[int]
    ) -> list[Sequence[TokenLogprobs | None]]:
        """Log-probabilities of what each run sampled, where its request asks for them."""
        rows: list[int] = []
        num_top: list[int] = []
        for run, first in zip(verified, bounds, strict=False):
            wanted = run.run.spec.sampling.logprobs
            if wanted is not None and run.sampled:
                rows += [first, *(first + 1 + node for node in run.accepted)]
                num_top += [wanted] * len(run.sampled)
        if not rows:
            return [[None] * len(run.sampled) for run in verified]
        index = torch.tensor(rows, device=self._device)
        scored = iter(score_tokens(logits[index], token_ids[index], num_top))
        return [
            [next(scored) if run.run.spec.sampling.logprobs is not None else None for _ in run.sampled]
            for run in verified
        ]

    def _keep_accepted(self, verified: Sequence[VerifiedRun]) -> None:
        """Bring the KV of guesses that came true into the slots of their positions; those of a chain are there."""
        size = self._kv.layout.block_size_tokens
        sources: list[int] = []
        targets: list[int] = []
        for run in verified:
            moved = [(node, place) for place, node in enumerate(run.accepted) if node != place]
            sources += run.slots([run.run.end + node for node, _ in moved], size)
            targets += run.slots([run.run.end + place for _, place in moved], size)
        if sources:
            slots = (torch.tensor(sources, device=self._device), torch.tensor(targets, device=self._device))
            copy_tokens(self._target_pool, *slots)
            if self._in_step is not None:
                copy_tokens(self._kv.group(self._in_step.group), *slots)

    def _score_prompt(self, hidden: Tensor, wanted: PromptLogprobRows) -> list[TokenLogprobs]:
        scored: list[TokenLogprobs] = []
        for start in range(0, len(wanted.rows), SCORED_ROWS):
            rows = wanted.rows[start : start + SCORED_ROWS]
            token_ids = torch.tensor(wanted.next_token_ids[start : start + SCORED_ROWS], device=self._device)
            logits = self._model.compute_logits(hidden[rows.start : rows.stop])
            scored += score_tokens(logits, token_ids, [wanted.num_top] * len(rows))
        return scored


def _walk(run: ScheduledRun, first_row: int, chosen: Sequence[int]) -> VerifiedRun:
    if not chosen:
        return VerifiedRun(run, first_row)
    accepted = [] if run.draft is None else accepted_nodes(run.draft, chosen)
    last = accepted[-1] + 1 if accepted else 0
    guessed = [] if run.draft is None else [run.draft.token_ids[node] for node in accepted]
    return VerifiedRun(run, first_row, tuple(accepted), (*guessed, chosen[last]))


def _pairs(copies: Sequence[BlockCopy]) -> list[tuple[int, int]]:
    return [(copy.source, copy.target) for copy in copies]
