"""A step's runs as one flat batch for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from eagleray.engine.scheduling.plan import ScheduledRun
from eagleray.kernels.paged_attention.api import AttentionPlan, TreeRun, plan_attention, tree_run


@dataclass(frozen=True, slots=True)
class StepBatch:
    """T tokens of all runs, one run behind the other: its known tokens, then its guesses."""

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    attention: AttentionPlan
    run_starts: tuple[int, ...]  # index in T of each run's first token


@dataclass(frozen=True, slots=True)
class PromptLogprobRows:
    """Positions of one run whose next token is a prompt token that the request wants scored."""

    request_id: str
    rows: range  # in T
    next_token_ids: Sequence[int]  # one per row
    num_top: int


def build_batch(runs: Sequence[ScheduledRun], block_size_tokens: int, device: str) -> StepBatch:
    """Flatten ``runs`` and plan their attention."""
    input_ids = [token_id for run in runs for token_id in _token_ids(run)]
    positions = [position for run in runs for position in _positions(run)]
    query_starts = list(accumulate((run.num_rows for run in runs), initial=0))
    return StepBatch(
        input_ids=torch.tensor(input_ids, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        attention=plan_attention(
            query_starts,
            [run.start for run in runs],
            [run.block_ids for run in runs],
            block_size_tokens,
            device,
            [_tree(run) for run in runs],
        ),
        run_starts=tuple(query_starts[:-1]),
    )


def _token_ids(run: ScheduledRun) -> Sequence[int]:
    known = run.known_token_ids[run.start : run.end]
    return known if run.draft is None else [*known, *run.draft.token_ids]


def _positions(run: ScheduledRun) -> Sequence[int]:
    known = range(run.start, run.end)
    return known if run.draft is None else [*known, *(run.end - 1 + depth for depth in run.draft.depths)]


def _tree(run: ScheduledRun) -> TreeRun | None:
    """The known tokens of a run with guesses are a chain; its last one is the root."""
    if run.draft is None or run.draft.is_chain:
        return None
    known = range(-1, run.num_tokens - 1)
    return tree_run([*known, *(run.num_tokens + parent for parent in run.draft.parents)])


def prompt_logprob_rows(runs: Sequence[ScheduledRun], run_starts: Sequence[int]) -> list[PromptLogprobRows]:
    """What the requests of ``runs`` that ask for prompt log-probabilities get from this step."""
    wanted = []
    for run, first_row in zip(runs, run_starts, strict=True):
        num_top = run.spec.sampling.prompt_logprobs
        end = min(run.end, run.spec.num_prompt_tokens - 1)
        if num_top is not None and run.start < end:
            rows = range(first_row, first_row + end - run.start)
            next_token_ids = run.known_token_ids[run.start + 1 : end + 1]
            wanted.append(PromptLogprobRows(run.spec.request_id, rows, next_token_ids, num_top))
    return wanted
