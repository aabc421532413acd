"""A worker: an engine on its step thread, the direct channel to the ingresses, and its part in the hand-over.

What makes it a prefill or a decode worker is the ``HandOver`` that it is composed with, and its engine's settings.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import msgspec

from eagleray.core.block_hash import CachedBlock
from eagleray.core.clock import Clock
from eagleray.core.config import EngineConfig
from eagleray.core.errors import InvalidRequest
from eagleray.core.messages import (
    Accepted,
    Failed,
    RefusalKind,
    Refused,
    StepOutputs,
    Submit,
    ToIngress,
    TokenOutput,
    Welcome,
)
from eagleray.core.request import RequestState
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.engine.engine import Engine, StepOutcome
from eagleray.engine.execution.host_memory import give_back_freed_memory
from eagleray.workers.cache_announcer import CacheAnnouncer
from eagleray.workers.channel import HEARTBEAT_INTERVAL_S, Channel
from eagleray.workers.hand_over import HandOver, Schedule
from eagleray.workers.meter import StepMeter
from eagleray.workers.step_loop import StepLoop

# Ingresses hear of what changes this often at most; of a worker that has nothing to say, as often as the channel asks.
SNAPSHOT_INTERVAL_S: Final = 0.1
STOP_DEADLINE_S: Final = 5.0
_COMPUTED_ELSEWHERE: Final = frozenset({RequestState.RESERVED, RequestState.HANDED_OVER})


class CacheListener(Protocol):
    """Hears which blocks the worker's cache holds (the publisher of the prefix index)."""

    def stored(self, blocks: list[CachedBlock]) -> None: ...

    def evicted(self, blocks: list[CachedBlock]) -> None: ...


class Worker:
    """Serves submits that come over the channel until ``stop``. ``new_hand_over(schedule)`` builds the role's part."""

    def __init__(
        self,
        worker_id: str,
        role: Role,
        epoch: int,
        engine: Engine,
        new_hand_over: Callable[[Schedule], HandOver],
        clock: Clock,
        *,
        config: EngineConfig,
        host: str = "127.0.0.1",
        cache_listener: CacheListener | None = None,
    ) -> None:
        self.worker_id, self.role, self.epoch = worker_id, role, epoch
        self._engine, self._clock = engine, clock
        self._config = config
        self._meter = StepMeter()
        self._owners: dict[str, int] = {}  # request id -> connection; the step thread's
        self._draining = False
        self._drained = threading.Event()
        self._last_snapshot_s = -SNAPSHOT_INTERVAL_S
        self._num_snapshots = 0
        self.failure: BaseException | None = None
        self._loop = StepLoop(
            engine, clock, self._stepped, self._ticked, self._failed, on_long_idle=give_back_freed_memory
        )
        self._hand_over = new_hand_over(self._loop.call)
        self._channel = Channel(self, host)
        announcer = CacheAnnouncer(self._channel.broadcast)
        self._announcer = announcer if cache_listener is None else None
        self._cache_listener: CacheListener = announcer if cache_listener is None else cache_listener
        self._snapshot = self._take_snapshot()

    @property
    def address(self) -> str:
        """host:port of the direct channel."""
        return self._channel.address

    @property
    def is_healthy(self) -> bool:
        return self.failure is None and self._loop.is_alive

    @property
    def snapshot(self) -> WorkerSnapshot:
        return self._snapshot

    def serves(self, request_id: str) -> bool:
        """Whether the request is here; a moment behind the truth."""
        return request_id in self._owners

    def start(self) -> None:
        self._loop.start()
        self._channel.start()

    def drain(self, deadline_s: float) -> bool:
        """Take nothing new and wait for what is here to end, as it does when the engine fails; False when the deadline
        passed first."""
        self._loop.call(lambda engine: self._begin_draining())
        return self._drained.wait(deadline_s)

    def stop(self) -> None:
        self._close_connections()
        self._loop.stop(STOP_DEADLINE_S)

    def check_integrity(self, deadline_s: float = STOP_DEADLINE_S) -> None:
        """Raise ``IntegrityError`` unless every block is accounted for. For tests and diagnosis."""
        done = threading.Event()
        errors: list[Exception] = []

        def check(engine: Engine) -> None:
            try:
                engine.check_integrity()
            except Exception as error:
                errors.append(error)
            done.set()

        self._loop.call(check)
        if not done.wait(deadline_s):
            raise TimeoutError(f"worker {self.worker_id} did not come to its commands within {deadline_s} s")
        if errors:
            raise errors[0]

    # ---- from the channel's thread

    def greeting(self) -> Iterable[ToIngress]:
        yield Welcome(
            worker_id=self.worker_id,
            role=self.role,
            epoch=self.epoch,
            region=self._hand_over.region,
            max_model_tokens=self._engine.max_model_tokens,
            snapshot=self._snapshot,
        )
        if self._announcer is not None:
            yield from self._announcer.all_held()

    def heartbeat(self) -> ToIngress | None:
        """While nothing changes: the last snapshot again, and for how long a step has been running. One that runs for
        too long will never end as far as anybody can tell."""
        running_s = self._loop.step_running_s
        if running_s > self._config.step_deadline_s:
            deadline_s = self._config.step_deadline_s
            self._failed(TimeoutError(f"a step has been running for more than engine.step_deadline_s={deadline_s}"))
        if self._clock.now_s() - self._last_snapshot_s < HEARTBEAT_INTERVAL_S:
            return None  # the step thread speaks for itself
        return StepOutputs(snapshot=msgspec.structs.replace(self._snapshot, step_running_s=running_s))

    def submitted(self, connection: int, submit: Submit) -> None:
        self._loop.call(lambda engine: self._accept(connection, submit))

    def aborted(self, connection: int, request_id: str) -> None:
        self._loop.call(lambda engine: self._abort(connection, request_id))

    def disconnected(self, connection: int) -> None:
        """An ingress that is gone takes its requests along."""
        self._loop.call(lambda engine: self._abort_all(connection))

    # ---- on the step thread

    def _accept(self, connection: int, submit: Submit) -> None:
        request_id = submit.spec.request_id
        reply: Accepted | Refused
        if self._draining:
            reply = Refused(request_id, RefusalKind.DRAINING, "this worker is being stopped")
        elif self._engine.scheduler.num_waiting >= self._config.max_num_waiting:
            reason = f"{self._config.max_num_waiting} requests are waiting already"
            reply = Refused(request_id, RefusalKind.NO_ROOM, reason)
        elif self._engine.state_of(request_id) is not None:
            reply = Refused(request_id, RefusalKind.INCOMPATIBLE, f"request {request_id!r} is being served already")
        else:
            try:
                reply = self._hand_over.accept(self._engine, submit)
            except InvalidRequest as error:
                reply = Refused(request_id, RefusalKind.INVALID, error.message)
        if isinstance(reply, Accepted):
            self._owners[request_id] = connection
            self._meter.prompt_tokens_total += submit.spec.num_prompt_tokens
        self._channel.send({connection: reply})

    def _abort(self, connection: int, request_id: str) -> None:
        if self._owners.get(request_id) == connection:
            del self._owners[request_id]
            self._hand_over.abort(self._engine, request_id)

    def _abort_all(self, connection: int) -> None:
        for request_id in [owned for owned, owner in self._owners.items() if owner == connection]:
            self._abort(connection, request_id)

    def _stepped(self, outcome: StepOutcome, step_s: float) -> None:
        self._meter.note(outcome, step_s)
        messages: dict[int, list[TokenOutput]] = {}
        for output in outcome.outputs:
            connection = self._owners.get(output.request_id)
            if connection is not None:
                messages.setdefault(connection, []).append(output)
        if messages:
            self._channel.send({connection: StepOutputs(tuple(outputs)) for connection, outputs in messages.items()})
        self._hand_over.stepped(self._engine, outcome)

    def _ticked(self) -> bool:
        """False: it was too soon to tell all."""
        stored, evicted = self._engine.drain_cache_changes()
        if stored:
            self._cache_listener.stored(stored)
        if evicted:
            self._cache_listener.evicted(evicted)
        now_s = self._clock.now_s()
        if now_s - self._last_snapshot_s < SNAPSHOT_INTERVAL_S:
            return False
        self._last_snapshot_s = now_s
        live = {request.request_id for request in self._engine.scheduler}
        self._owners = {owned: connection for owned, connection in self._owners.items() if owned in live}
        self._snapshot = self._take_snapshot()
        self._channel.broadcast(StepOutputs(snapshot=self._snapshot))
        if self._draining and not live:
            self._drained.set()
        return True

    def _begin_draining(self) -> None:
        self._draining = True

    def _failed(self, error: BaseException) -> None:
        """The engine cannot go on. Every ingress is told before its connection ends. Ending the hand-over tells every
        reader, who would wait for more blocks as long as our source is alive. The requests continue elsewhere."""
        if self.failure is not None:
            return
        self.failure = error
        self._drained.set()
        last_words = Failed(f"its engine failed: {error!r}")
        threading.Thread(target=self._close_connections, args=(last_words,), name="worker-stop", daemon=True).start()

    def _close_connections(self, last_words: Failed | None = None) -> None:
        self._channel.stop(last_words)
        self._hand_over.stop()

    def _take_snapshot(self) -> WorkerSnapshot:
        self._num_snapshots += 1
        scheduler, kv, meter = self._engine.scheduler, self._engine.kv, self._meter
        states = Counter(request.state for request in scheduler)
        return WorkerSnapshot(
            worker_id=self.worker_id,
            role=self.role,
            epoch=self.epoch,
            number=self._num_snapshots,
            pid=os.getpid(),
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_reserved=states[RequestState.RESERVED],
            num_handed_over=states[RequestState.HANDED_OVER],
            uncomputed_tokens=sum(
                request.num_uncomputed_tokens for request in scheduler if request.state not in _COMPUTED_ELSEWHERE
            ),
            blocks_total=kv.pool.num_blocks,
            blocks_free=kv.pool.num_free,
            blocks_cached=len(kv.cache),
            prefill_tokens_per_s=meter.prefill_tokens_per_s,
            decode_step_s=meter.decode_step_s,
            num_preemptions=scheduler.num_preemptions,
            cached_tokens_total=meter.cached_tokens_total,
            prompt_tokens_total=meter.prompt_tokens_total,
            output_tokens_total=meter.output_tokens_total,
            transfer_bytes_total=self._hand_over.bytes_total,
            transfer_failures_total=self._hand_over.failures_total,
            acceptance=meter.acceptance,
        )
