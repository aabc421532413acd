"""The one loop, ``schedule -> execute -> update``: prefill workers, decode workers and offline use all run it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from eagleray.core.block_hash import CachedBlock, HashNamespace
from eagleray.core.clock import Clock
from eagleray.core.config import EngineConfig
from eagleray.core.errors import InvalidRequest
from eagleray.core.kv_layout import KVLayout
from eagleray.core.messages import TokenOutput
from eagleray.core.request import Request, RequestSpec, RequestState
from eagleray.engine.outputs import RequestOutputs, TextStreamFactory
from eagleray.engine.scheduling.kv_manager import KVManager
from eagleray.engine.scheduling.plan import Executor, StepHandle, StepPlan, StepResult
from eagleray.engine.scheduling.scheduler import Scheduler


class EngineExecutor(Executor, Protocol):
    """An executor with the pool that it computes on (``LocalExecutor``, ``FakeExecutor``)."""

    layout: KVLayout
    num_blocks: int
    num_host_blocks: int
    max_model_tokens: int
    model_identity: str


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
    is_idle: bool = False  # nothing could be scheduled: wait for a command


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks held for KV that comes from elsewhere; those before ``first_block`` hold a cached prefix already."""

    request_id: str
    block_ids: tuple[int, ...]
    first_block: int
    num_cached_tokens: int


class Engine:
    """Requests in, tokens out. One thread calls it; nothing in it waits for anything but the executor."""

    def __init__(
        self, executor: EngineExecutor, config: EngineConfig, clock: Clock, new_text_stream: TextStreamFactory
    ) -> None:
        self._executor = executor
        self._clock = clock
        self._new_text_stream = new_text_stream
        block_size = executor.layout.block_size_tokens
        self.namespace = HashNamespace(executor.model_identity, block_size, executor.layout.digest())
        self._kv = KVManager(
            executor.num_blocks,
            block_size,
            self.namespace.root,
            num_host_blocks=executor.num_host_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self._scheduler = Scheduler(config, self._kv)
        self._outputs: dict[str, RequestOutputs] = {}
        # A request that fits alone can always finish: whatever else there is gives way to it.
        self.max_model_tokens = min(executor.max_model_tokens, executor.num_blocks * block_size)

    # ---- requests

    def add(self, spec: RequestSpec, output_limit: int | None = None) -> None:
        """Queue a request. With ``output_limit`` it is handed over after so many tokens of its own.

        Raises ``InvalidRequest`` for one that can never be computed here.
        """
        request = self._new_request(spec, output_limit)
        self._scheduler.add(request)
        self._follow(request)

    def reserve(self, spec: RequestSpec) -> Reservation | None:
        """Hold blocks for a request whose KV will come from elsewhere, or None when there is no room now."""
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
        request = self._scheduler.get(request_id)
        if request is None:
            return False
        self._scheduler.end(request, state)
        self._outputs.pop(request_id, None)
        return True

    def state_of(self, request_id: str) -> RequestState | None:
        request = self._scheduler.get(request_id)
        return None if request is None else request.state

    # ---- the loop

    def step(self) -> StepOutcome:
        """One turn of the loop."""
        plan = self._scheduler.schedule()
        if plan.is_empty:
            return StepOutcome(is_idle=True)
        return self._update(plan, self._submit(plan).result())

    def _submit(self, plan: StepPlan) -> StepHandle:
        for run in plan.runs:
            self._outputs[run.spec.request_id].note_scheduled()
        return self._executor.submit(plan)

    def _update(self, plan: StepPlan, result: StepResult) -> StepOutcome:
        self._scheduler.note_step(plan)
        outcome = StepOutcome(
            num_computed_tokens=plan.num_tokens, decode_only=all(run.num_tokens == 1 for run in plan.runs)
        )
        for run in plan.runs:
            request_id = run.spec.request_id
            request = self._scheduler.get(request_id)
            if request is None:
                continue
            if request_id in result.prompt_logprobs:
                self._outputs[request_id].note_prompt_logprobs(run.start, result.prompt_logprobs[request_id])
            is_finished = False
            if run.samples:
                output = self._outputs[request_id].push(result.sampled[request_id])
                outcome.outputs.append(output)
                is_finished = output.finish_reason is not None
            if request.output_limit is not None:
                outcome.progress.append(self._progress(request, is_finished))
            elif is_finished:
                self.end(request_id, RequestState.FINISHED)
        return outcome

    def _progress(self, request: Request, is_finished: bool) -> Progress:
        """What a reader may take of a request by now. When it has finished or is at its output limit it stays for its
        reader only, and ends when that one is done."""
        token_ids: tuple[int, ...] = ()
        if is_finished or request.num_emitted_here == request.output_limit:
            token_ids = tuple(request.token_ids[len(request.spec.token_ids) :])
            self._scheduler.hand_over(request)
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
        if self._scheduler.get(spec.request_id) is not None:
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
        self._outputs[request.request_id] = RequestOutputs(
            request, self._new_text_stream(request.spec), self._clock, self.max_model_tokens
        )
