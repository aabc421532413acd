"""One step on the model: swap copies, forward, sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eagleray.core.messages import TokenLogprobs
from eagleray.engine.execution.batch import PromptLogprobRows, build_batch, prompt_logprob_rows
from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.memory_plan import SCORED_ROWS
from eagleray.engine.execution.sampler import sample_runs, score_tokens
from eagleray.engine.scheduling.plan import BlockCopy, SampledToken, ScheduledRun, StepPlan, StepResult
from eagleray.kernels.select import Kernels
from eagleray.models.decoder import Decoder


class ModelRunner:
    """Computes steps on one model and its KV pools, in the calling thread. Not thread-safe."""

    def __init__(self, model: Decoder, kv: KVTensors, host_kv: KVTensors | None, device: str, kernels: Kernels) -> None:
        self._model = model
        self._kv = kv
        self._host_kv = host_kv
        self._device = device
        self._kernels = kernels

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Do the copies of ``plan``, then compute its runs as one batch."""
        self._swap(plan)
        if not plan.runs:
            return StepResult()
        batch = build_batch(plan.runs, self._kv.layout.block_size_tokens, self._device)
        pool = self._kv.group(self._kv.layout.groups[0].name)
        hidden = self._model.forward(batch.input_ids, batch.positions, pool, batch.attention)  # [T, hidden]
        wanted = prompt_logprob_rows(plan.runs, batch.run_starts)
        return StepResult(
            sampled=self._sample(hidden, plan.runs, batch.run_starts),
            prompt_logprobs={rows.request_id: self._score_prompt(hidden, rows) for rows in wanted},
        )

    def _swap(self, plan: StepPlan) -> None:
        if not (plan.swap_out or plan.swap_in):
            return
        if self._host_kv is None:
            raise ValueError("a plan that swaps needs host blocks: engine.num_host_blocks is 0")
        for group in self._kv.layout.groups:
            device_pool, host_pool = self._kv.group(group.name), self._host_kv.group(group.name)
            self._kernels.copy_blocks(device_pool, host_pool, _pairs(plan.swap_out))
            self._kernels.copy_blocks(host_pool, device_pool, _pairs(plan.swap_in))

    def _sample(
        self, hidden: Tensor, runs: Sequence[ScheduledRun], run_starts: Sequence[int]
    ) -> dict[str, SampledToken]:
        sampling = [
            (run, start + run.num_tokens - 1) for run, start in zip(runs, run_starts, strict=True) if run.samples
        ]
        if not sampling:
            return {}
        last_rows = torch.tensor([row for _, row in sampling], device=self._device)
        logits = self._model.compute_logits(hidden[last_rows])
        return sample_runs(logits, [run for run, _ in sampling], self._kernels.sample_tokens)

    def _score_prompt(self, hidden: Tensor, wanted: PromptLogprobRows) -> list[TokenLogprobs]:
        scored: list[TokenLogprobs] = []
        for start in range(0, len(wanted.rows), SCORED_ROWS):
            rows = wanted.rows[start : start + SCORED_ROWS]
            token_ids = torch.tensor(wanted.next_token_ids[start : start + SCORED_ROWS], device=self._device)
            logits = self._model.compute_logits(hidden[rows.start : rows.stop])
            scored += score_tokens(logits, token_ids, [wanted.num_top] * len(rows))
        return scored


def _pairs(copies: Sequence[BlockCopy]) -> list[tuple[int, int]]:
    return [(copy.source, copy.target) for copy in copies]
