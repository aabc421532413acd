"""What one step does: plain data from the scheduler to an executor (or a simulator), and back. What there is one of for
each token is a struct of msgspec's: a frozen dataclass takes ten times as long to make.

No phases: each scheduled request computes a run of its known tokens. A run that reaches the last known token also
samples the next one. Chunked prefill, decode, prefix hits, preemption and fail-over all look like this. Speculation
adds a tail of guesses to a run that samples: those that come true are sampled tokens like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from eagleray.core.messages import TokenLogprobs
from eagleray.core.request import RequestSpec
from eagleray.engine.speculation.tree import DraftShape, DraftTree


class ScheduledRun(msgspec.Struct, frozen=True):
    """Compute ``known_token_ids[start : start + num_tokens]`` of one request. Both sequences are the engine's own, as
    copies would cost more with every token: they are valid until the step is over."""

    spec: RequestSpec
    known_token_ids: Sequence[int]  # prompt and output so far
    start: int  # tokens computed before; position of the first token of the run
    num_tokens: int
    block_ids: Sequence[int]  # block i holds positions [i * block_size, (i + 1) * block_size); covers the run's rows
    samples: bool  # the run ends with the last known token: choose the next one
    draft: DraftTree | None = None  # guesses to verify: node i is computed in the slot of position ``end + i``
    may_draft: bool = False  # guess for the next step; the blocks reach far enough
    num_deferred: int = 0  # tokens before ``start`` whose KV of the draft has not been written yet
    defers: bool = False  # that of this run need not be written now either

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def num_rows(self) -> int:
        """Tokens that are computed: known ones and guesses."""
        return self.num_tokens + (len(self.draft) if self.draft is not None else 0)


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy one whole block, before anything of the step is computed."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Copies happen in the order swap out, swap in; then the runs are computed as one batch."""

    runs: tuple[ScheduledRun, ...] = ()
    swap_out: tuple[BlockCopy, ...] = ()  # device block -> host block
    swap_in: tuple[BlockCopy, ...] = ()  # host block -> device block
    shape: DraftShape | None = None  # of the guesses for the next step, for runs that may draft

    @property
    def num_tokens(self) -> int:
        """Known tokens that are computed."""
        return sum([run.num_tokens for run in self.runs])

    @property
    def is_decode_only(self) -> bool:
        """Every run is one token long."""
        return self.num_tokens == len(self.runs)

    @property
    def is_empty(self) -> bool:
        return not (self.runs or self.swap_out or self.swap_in)


class SampledToken(msgspec.Struct, frozen=True):
    token_id: int
    logprobs: TokenLogprobs | None = None  # when the request asks for logprobs


@dataclass(slots=True)
class StepResult:
    """What the executor computed. ``prompt_logprobs[id]`` holds, for each position p of the run with p + 1 still in
    the prompt, the log-probabilities of token p + 1; only for requests that ask for them."""

    # By request id, for runs that sample: the guesses that came true, as sampled, and the token after them. The KV of
    # all but the last is in the slots of their positions.
    sampled: dict[str, tuple[SampledToken, ...]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    drafts: dict[str, DraftTree] = field(default_factory=dict)  # guesses for the next step
    verify_s: float = 0.0  # computing and sampling
    draft_s: float = 0.0  # guessing


class StepHandle(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what the executor met."""
        ...


class Executor(Protocol):
    """Runs steps in the order they were submitted. The next may be submitted while one runs."""

    def submit(self, plan: StepPlan) -> StepHandle:
        """Begin a step, and return while it computes."""
        ...
