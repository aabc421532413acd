"""Workers without engines and a pool without connections: a test says what each of them does, and when.

Nothing happens by itself. A worker answers submits as ``replies`` tells it, and sends what ``say`` is called with; time
passes, and a wait for a change ends, when the pool is told so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

import msgspec

from eagleray.core.clock import ManualClock
from eagleray.core.errors import WorkerLost
from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.core.kv_region import KVRegion
from eagleray.core.messages import Accepted, RefusalKind, Submit, TokenOutput, Welcome
from eagleray.core.request import FinishReason
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.router.worker_client import Sink, SubmitRefused


def fake_welcome(
    worker_id: str,
    role: Role,
    *,
    block_size_tokens: int = 4,
    num_blocks: int = 64,
    max_model_tokens: int = 256,
    draft_identity: str = "",
) -> Welcome:
    """What an idle worker of a tiny model says of itself."""
    layout = KVLayout(block_size_tokens, (LayerGroup("fake", 1, 1, 1, "float32"),))
    return Welcome(
        worker_id=worker_id,
        role=role,
        epoch=1,
        region=KVRegion(
            worker_id, 1, layout, num_blocks, (0,), f"{worker_id}:1", "fake", draft_identity=draft_identity
        ),
        max_model_tokens=max_model_tokens,
        snapshot=WorkerSnapshot(
            worker_id=worker_id, role=role, epoch=1, blocks_total=num_blocks, blocks_free=num_blocks
        ),
    )


class FakeWorker:
    """A ``WorkerClient``. ``submits`` and ``aborts`` keep all that it was told, ``open_requests`` what is still there.

    ``replies`` holds what happens to the next submits: a kind of refusal, an error to raise, or None to accept. When it
    is empty everything is accepted. A submit first waits for ``may_reply``, which is set unless a test clears it.
    """

    def __init__(self, welcome: Welcome) -> None:
        self.welcome = welcome
        self.snapshot: WorkerSnapshot = welcome.snapshot
        self.replies: deque[RefusalKind | WorkerLost | None] = deque()
        self.may_reply = asyncio.Event()
        self.may_reply.set()
        self.submits: list[Submit] = []
        self.aborts: list[str] = []
        self.is_lost = False
        self._sinks: dict[str, Sink] = {}

    # ---- WorkerClient

    async def submit(self, submit: Submit, sink: Sink) -> Accepted:
        self.submits.append(submit)
        await self.may_reply.wait()
        reply = self.replies.popleft() if self.replies else None
        if isinstance(reply, RefusalKind):
            raise SubmitRefused(self.welcome.worker_id, reply, f"{reply.value}, says the script")
        if reply is not None:
            raise reply
        self._sinks[submit.spec.request_id] = sink
        return Accepted(submit.spec.request_id)

    def abort(self, request_id: str) -> None:
        self.aborts.append(request_id)
        self._sinks.pop(request_id, None)

    # ---- the test's side

    @property
    def open_requests(self) -> list[str]:
        """Accepted, and neither ended nor aborted."""
        return list(self._sinks)

    def say(
        self, position: int, *token_ids: int, finish: FinishReason | None = None, to: str | None = None, **rest: object
    ) -> None:
        """Send tokens of request ``to``, by default of the last one accepted; ``rest`` are fields of the output."""
        request_id = self.open_requests[-1] if to is None else to
        sink = self._sinks[request_id]
        if finish is not None:
            del self._sinks[request_id]
        choice = next(submit.spec.choice for submit in self.submits if submit.spec.request_id == request_id)
        texts = tuple(str(token_id) for token_id in token_ids)
        output = TokenOutput(request_id, position, choice, token_ids, texts, finish_reason=finish)
        sink(msgspec.structs.replace(output, **rest))

    def lose(self, reason: str = "the connection closed", *, engine_failed: bool = False) -> None:
        """The connection is gone: every request that is here hears of it."""
        self.is_lost = True
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(WorkerLost(self.welcome.worker_id, reason, engine_failed=engine_failed))


class FakeWorkerPool:
    """A ``WorkerPool`` of fake workers on a manual clock."""

    def __init__(self, clock: ManualClock, *workers: FakeWorker) -> None:
        self.clock = clock
        self._workers = {worker.welcome.worker_id: worker for worker in workers}
        self._waits: list[tuple[float, asyncio.Event]] = []  # (deadline on the clock, what ends the wait)

    def workers(self) -> Mapping[str, FakeWorker]:
        return {worker_id: worker for worker_id, worker in self._workers.items() if not worker.is_lost}

    async def wait_for_change(self, deadline_s: float) -> None:
        wait = (self.clock.now_s() + deadline_s, asyncio.Event())
        self._waits.append(wait)
        try:
            await wait[1].wait()
        finally:
            self._waits.remove(wait)

    # ---- the test's side

    @property
    def num_waits(self) -> int:
        """How many wait for a change now."""
        return len(self._waits)

    def join(self, worker: FakeWorker) -> None:
        self._workers[worker.welcome.worker_id] = worker
        self.change()

    def change(self) -> None:
        """Every worker sends a new snapshot; whoever waits for a change looks again."""
        for worker in self._workers.values():
            worker.snapshot = msgspec.structs.replace(worker.snapshot, number=worker.snapshot.number + 1)
        for _, changed in self._waits:
            changed.set()

    def advance(self, seconds: float) -> None:
        """Time passes; waits end that have reached their deadline."""
        self.clock.advance(seconds)
        for deadline_s, changed in self._waits:
            if deadline_s <= self.clock.now_s():
                changed.set()
