"""The one loop, ``schedule -> execute -> update``: prefill workers, decode workers and offline use all run it.

    this thread:   begin(k)            wait(k)  begin(k+1)  report(k)            wait(k+1)  begin(k+2)  report(k+1)
    the executor:           [ step k  ]                    [ step k+1           ]                      [ step k+2

A step is scheduled when the tokens of the one before are known, and runs while their text is made and sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from eagleray.core.acceptance import Acceptance
from eagleray.core.block_hash import CachedBlock, HashNamespace
from eagleray.core.clock import Clock
from eagleray.core.config import EngineConfig
from eagleray.core.errors import InvalidRequest
from eagleray.core.kv_layout import KVLayout
from eagleray.core.messages import TokenOutput
from eagleray.core.request import Request, RequestSpec, RequestState
from eagleray.engine.outputs import NewTokens, RequestOutputs, TextStreamFactory
from eagleray.engine.scheduling.kv_manager import KVManager
from eagleray.engine.scheduling.plan import Executor, ScheduledRun, StepHandle, StepPlan, StepResult
from eagleray.engine.scheduling.scheduler import Scheduler
from eagleray.engine.speculation.accounts import GuessAccounts, acceptances_of
from eagleray.engine.speculation.controller import DraftPolicy, NoDrafts


class EngineExecutor(Executor, Protocol):
    """An executor with the pool that it computes on (``LocalExecutor``, ``FakeExecutor``)."""

    layout: KVLayout
    num_blocks: int
    num_host_blocks: int
    max_model_tokens: int
    model_identity: str
    draft_identity: str


@dataclass(frozen=True, slots=True)
class Progress:
    """A request that will be handed over has new KV: blocks of its table are written up to ``num_computed_tokens``."""

    request_id: str
    block_ids: tuple[int, ...]
    num_computed_tokens: int
    token_ids: tuple[int, ...] = ()  # sampled here; with them the request is handed over and nothing follows
    is_finished: bool = False  # it ended with those tokens: its reader has nothing to go on with


@dataclass(slots=True)
class StepOutcome:
    """What one step brought."""

    outputs: list[TokenOutput] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    num_computed_tokens: int = 0
    decode_only: bool = False  # every run was one token long
    acceptance: Acceptance | None = None  # over the requests that decoded, where the engine guesses
    is_idle: bool = False  # nothing could be scheduled: wait for a command


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks held for KV that comes from elsewhere; those before ``first_block`` hold a cached prefix already."""

    request_id: str
    block_ids: tuple[int, ...]
    first_block: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class _StepUnderWay:
    plan: StepPlan
    handle: StepHandle


class _ComputedRun(msgspec.Struct, frozen=True):
    run: ScheduledRun
    request: Request
    outputs: RequestOutputs
    new: NewTokens | None  # sampled by the run


@dataclass(frozen=True, slots=True)
class _EndedStep:
    plan: StepPlan
    result: StepResult
    runs: list[_ComputedRun]  # of the requests that were still there
    outside_s: float  # since the step before, what it took besides computing and guessing


class Engine:
    """Requests in, tokens out. One thread calls it; nothing in it waits for anything but the executor."""

    def __init__(
        self,
        executor: EngineExecutor,
        config: EngineConfig,
        clock: Clock,
        new_text_stream: TextStreamFactory,
        draft_policy: DraftPolicy | None = None,
    ) -> None:
        self._executor = executor
        self._clock = clock
        self._new_text_stream = new_text_stream
        block_size = executor.layout.block_size_tokens
        self.namespace = HashNamespace(
            executor.model_identity, block_size, executor.layout.digest(), executor.draft_identity
        )
        self._kv = KVManager(
            executor.num_blocks,
            block_size,
            self.namespace.root,
            num_host_blocks=executor.num_host_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self._draft_policy = draft_policy or NoDrafts()
        self._guesses = not isinstance(self._draft_policy, NoDrafts)
        self._accounts = GuessAccounts(self._draft_policy)
        self._last_end_s: float | None = None  # of the step before, if there has been work ever since
        # A request that fits alone can always finish: whatever else there is gives way to it.
        self.max_model_tokens = min(executor.max_model_tokens, executor.num_blocks * block_size)
        self._scheduler = Scheduler(config, self._kv, self._draft_policy, self.max_model_tokens)
        self._outputs: dict[str, RequestOutputs] = {}  # until the last output of a request has been reported
        self._unscheduled: dict[str, RequestOutputs] = {}  # of them, those that have had no run yet
        self._under_way: _StepUnderWay | None = None
        self._ended: _EndedStep | None = None  # not reported yet

    # ---- requests

    def add(self, spec: RequestSpec, output_limit: int | None = None) -> None:
        """Queue a request. With ``output_limit`` it is handed over after so many tokens of its own.

        Raises ``InvalidRequest`` for one that can never be computed here.
        """
        request = self._new_request(spec, output_limit)
        self._scheduler.add(request)
        self._follow(request)

    def reserve(self, spec: RequestSpec) -> Reservation | None:
        """Hold blocks for a request whose KV will come from elsewhere, or None when there is no room now.

        Others may write to them from now on, so none may be one that a step under way still uses for a request that has
        ended meanwhile: waits for that step.
        """
        self.wait()
        request = self._new_request(spec, None)
        if not self._scheduler.reserve(request):
            return None
        self._follow(request)
        cached = request.num_computed_tokens
        num_blocks = self._kv.blocks_for(request.num_tokens)
        return Reservation(
            spec.request_id,
            tuple(self._kv.table(spec.request_id)[:num_blocks]),
            cached // self._kv.block_size_tokens,
            cached,
        )

    def commit(self, request_id: str, num_computed_tokens: int, token_ids: tuple[int, ...], transfer_s: float) -> None:
        """A reservation's KV is in up to ``num_computed_tokens``; go on from there. Unknown requests were aborted."""
        request = self._scheduler.get(request_id)
        if request is not None and request.state is RequestState.RESERVED:
            if request.spec.sampling.prompt_logprobs is not None and not token_ids:
                num_computed_tokens = 0  # they come from computing the prompt, not from its KV
            self._outputs[request_id].note_committed(token_ids, transfer_s)
            self._scheduler.commit(request, num_computed_tokens, token_ids)

    def end(self, request_id: str, state: RequestState = RequestState.ABORTED) -> bool:
        """Free everything of a request, whatever it is doing. False when it is not here (any more)."""
        if self._outputs.pop(request_id, None) is None:
            return False
        self._unscheduled.pop(request_id, None)
        request = self._scheduler.get(request_id)
        if request is not None:  # else it has ended, and only its last output was still to be reported
            self._scheduler.end(request, state)
        return True

    def state_of(self, request_id: str) -> RequestState | None:
        request = self._scheduler.get(request_id)
        return None if request is None else request.state

    # ---- the loop

    def step(self) -> StepOutcome:
        """One turn of the loop: what one step brought, while the next one computes already."""
        if self._under_way is None and self._ended is None and not self.begin():
            return StepOutcome(is_idle=True)
        self.wait()
        self.begin()
        return self.report() or StepOutcome()

    def begin(self) -> bool:
        """Schedule the next step and give it to the executor; False when nothing can be scheduled. To be called when
        no step is under way: what may be scheduled depends on what the last one sampled."""
        plan = self._scheduler.schedule()
        if plan.is_empty:
            self._last_end_s = None
            return False
        if self._unscheduled:
            for run in plan.runs:
                if (outputs := self._unscheduled.pop(run.spec.request_id, None)) is not None:
                    outputs.note_scheduled()
        self._under_way = _StepUnderWay(plan, self._executor.submit(plan))
        return True

    def wait(self) -> None:
        """Until the step under way is over, if there is one: then its tokens are known, and requests that have ended
        compute no more, but for those whose text will tell. Raises what the executor met."""
        if self._under_way is None:
            return
        step = self._under_way
        try:
            result = step.handle.result()
        except Exception:
            self._under_way = self._last_end_s = None
            raise
        self._under_way = None
        computed = self._scheduler.runs_that_count(step.plan)
        runs = [self._append(run, request, result) for run, request in computed]
        self._ended = _EndedStep(step.plan, result, runs, self._outside_s(result))

    def _outside_s(self, result: StepResult) -> float:
        """Of the step that has just ended."""
        last_end_s, self._last_end_s = self._last_end_s, self._clock.now_s()
        if last_end_s is None:
            return 0.0
        return max(0.0, self._last_end_s - last_end_s - result.verify_s - result.draft_s)

    def _append(self, run: ScheduledRun, request: Request, result: StepResult) -> _ComputedRun:
        """Take what a run sampled into its request."""
        request_id = request.request_id
        outputs = self._outputs[request_id]
        new = outputs.append(result.sampled[request_id]) if run.samples else None
        num_guessed = len(new.sampled) - 1 if new is not None else 0
        self._scheduler.note_computed(run, request, num_guessed, result.drafts.get(request_id))
        if new is not None:
            if request.output_limit is None:
                if new.finish_reason is not None:
                    self._scheduler.end(request, RequestState.FINISHED)
            elif new.finish_reason is not None or request.num_emitted_here == request.output_limit:
                self._scheduler.hand_over(request)
        return _ComputedRun(run, request, outputs, new)

    def report(self) -> StepOutcome | None:
        """What the step that has ended brought; None when that has been told. Text is made here, and what guesses
        brought is counted, while the next step computes: that one may have a run for a request that turns out to have
        ended, and nothing of it is kept."""
        if self._ended is None:
            return None
        step, self._ended = self._ended, None
        outcome = StepOutcome(num_computed_tokens=step.plan.num_tokens, decode_only=step.plan.is_decode_only)
        acceptances: Sequence[Acceptance | None] = [None] * len(step.runs)
        if self._guesses:
            acceptances, outcome.acceptance = acceptances_of([computed.run for computed in step.runs], step.result)
        for computed, acceptance in zip(step.runs, acceptances, strict=True):
            if self._outputs.get(computed.request.request_id) is computed.outputs:  # else it was aborted meanwhile
                self._report_run(computed, acceptance, step.result, outcome)
        if self._guesses:
            counted = [(each.run, len(each.new.sampled) if each.new is not None else 0) for each in step.runs]
            self._accounts.note(step.plan, step.result, counted, step.outside_s)
        return outcome

    def _report_run(
        self, computed: _ComputedRun, acceptance: Acceptance | None, result: StepResult, outcome: StepOutcome
    ) -> None:
        request, outputs = computed.request, computed.outputs
        if (scores := result.prompt_logprobs.get(request.request_id)) is not None:
            outputs.note_prompt_logprobs(computed.run.start, scores)
        is_finished = False
        if computed.new is not None:
            output = outputs.report(computed.new, acceptance)
            outcome.outputs.append(output)
            is_finished = output.finish_reason is not None
        if request.output_limit is not None:
            outcome.progress.append(self._progress(request, is_finished))
        elif is_finished:
            self._outputs.pop(request.request_id)
            if not request.state.is_final:
                self._scheduler.end(request, RequestState.FINISHED)

    def _progress(self, request: Request, is_finished: bool) -> Progress:
        """What a reader may take of a request by now. When it has finished or is at its output limit it stays for its
        reader only, and ends when that one is done."""
        if is_finished and request.state is not RequestState.HANDED_OVER:
            self._scheduler.hand_over(request)
        token_ids: tuple[int, ...] = ()
        if request.state is RequestState.HANDED_OVER:
            token_ids = tuple(request.token_ids[len(request.spec.token_ids) :])
        block_ids = self._kv.table(request.request_id)[: self._kv.blocks_for(request.num_computed_tokens)]
        return Progress(request.request_id, tuple(block_ids), request.num_computed_tokens, token_ids, is_finished)

    # ---- seen from outside

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def kv(self) -> KVManager:
        return self._kv

    @property
    def scheduler(self) -> Scheduler:
        return self._scheduler

    def drain_cache_changes(self) -> tuple[list[CachedBlock], list[CachedBlock]]:
        """(stored, evicted) blocks since the last call, for the cluster's index."""
        return self._kv.cache.drain_changes()

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()

    def _new_request(self, spec: RequestSpec, output_limit: int | None) -> Request:
        if spec.request_id in self._outputs:
            raise InvalidRequest(f"request_id={spec.request_id!r} is already being served.", param="request_id")
        if not spec.token_ids:
            raise InvalidRequest("The prompt is empty; send at least one token.", param="prompt")
        if len(spec.token_ids) >= self.max_model_tokens:
            raise InvalidRequest(
                f"The request has {len(spec.token_ids)} tokens; this model takes at most {self.max_model_tokens} "
                "including at least one new token. Send a shorter prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        return Request(spec, self._clock.now_s(), output_limit)

    def _follow(self, request: Request) -> None:
        outputs = RequestOutputs(request, self._new_text_stream(request.spec), self._clock, self.max_model_tokens)
        self._outputs[request.request_id] = self._unscheduled[request.request_id] = outputs
