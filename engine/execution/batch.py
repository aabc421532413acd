"""A step's runs as one flat batch for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from eagleray.engine.scheduling.plan import ScheduledRun
from eagleray.kernels.paged_attention.api import AttentionPlan, TreeRun, attention_vectors, plan_of_vectors, tree_run
from eagleray.kernels.replay.api import StepIntegers


@dataclass(frozen=True)
class StepBatch:
    """T tokens of all runs, one run behind the other: its known tokens, then its guesses."""

    integers: StepIntegers  # input ids, positions, what a draft has beside them, the vectors of attention
    num_beside: int
    block_size_tokens: int
    trees: tuple[TreeRun | None, ...]  # per run
    run_starts: tuple[int, ...]  # index in T of each run's first token

    @property
    def num_rows(self) -> int:
        """T."""
        return self.integers.lengths[0]

    @property
    def input_ids(self) -> Tensor:
        """int64 [T]."""
        return self.integers.tensors[0]

    @property
    def positions(self) -> Tensor:
        """int64 [T]."""
        return self.integers.tensors[1]

    @property
    def beside(self) -> tuple[Tensor, ...]:
        return self.integers.tensors[2 : 2 + self.num_beside]

    @cached_property
    def attention(self) -> AttentionPlan:
        return plan_of_vectors(self.integers.tensors[2 + self.num_beside :], self.block_size_tokens, self.trees)


@dataclass(frozen=True, slots=True)
class PromptLogprobRows:
    """Positions of one run whose next token is a prompt token that the request wants scored."""

    request_id: str
    rows: range  # in T
    next_token_ids: Sequence[int]  # one per row
    num_top: int


def build_batch(
    runs: Sequence[ScheduledRun], block_size_tokens: int, device: str, beside: Sequence[Sequence[int]] = ()
) -> StepBatch:
    """Flatten ``runs`` and plan their attention. ``beside`` are vectors of a draft that computes in the same step."""
    input_ids = [token_id for run in runs for token_id in _token_ids(run)]
    positions = [position for run in runs for position in _positions(run)]
    query_starts = list(accumulate((run.num_rows for run in runs), initial=0))
    trees = tuple(map(_tree, runs))
    of_attention = attention_vectors(
        query_starts, [run.start for run in runs], [run.block_ids for run in runs], block_size_tokens, trees
    )
    integers = StepIntegers(device, input_ids, positions, *beside, *of_attention)
    return StepBatch(integers, len(beside), block_size_tokens, trees, tuple(query_starts[:-1]))


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
