"""Leases joined to the pool: how each kind of worker takes in a request, and which of its blocks others may read.

Both sides keep one rule: blocks that somebody may still read or write stay held, and become free only when the
transfer says that it is quiet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from eagleray.core.errors import TransferError
from eagleray.core.kv_region import KVRegion
from eagleray.core.messages import Accepted, RefusalKind, Refused, Submit
from eagleray.core.request import RequestState
from eagleray.engine.engine import Engine, StepOutcome
from eagleray.kv_transfer.pull import PullResult
from eagleray.kv_transfer.receiver import KVReceiver
from eagleray.kv_transfer.session import SourceProgress
from eagleray.kv_transfer.source import KVSource
from eagleray.workers.meter import smoothed

# What a source tells a reader whose request ended with the first token: there is nothing to go on with.
FINISHED_AT_SOURCE: Final = "finished at its source"

Schedule = Callable[[Callable[[Engine], None]], None]  # runs a command on the step thread


class HandOver(Protocol):
    """How a worker takes part in the split. ``accept``, ``stepped`` and ``abort`` are called on the step thread."""

    bytes_total: int
    bytes_per_s: float  # smoothed; 0 until measured
    failures_total: int

    @property
    def region(self) -> KVRegion: ...

    def accept(self, engine: Engine, submit: Submit) -> Accepted | Refused: ...

    def stepped(self, engine: Engine, outcome: StepOutcome) -> None: ...

    def abort(self, engine: Engine, request_id: str) -> None: ...

    def stop(self) -> None: ...


class SourceHandOver:
    """Prefill side: computes up to the first token, announces blocks as chunks complete, keeps them for the reader.

    A request that is being handed over ends only through ``KVSource``: it says when nobody reads its blocks any more.
    """

    def __init__(self, new_source: Callable[[Callable[[str], None]], KVSource], schedule: Schedule) -> None:
        self._source = new_source(self._released)
        self._schedule = schedule
        self._open: set[str] = set()
        self.bytes_total = 0  # readers count what they read
        self.bytes_per_s = 0.0
        self.failures_total = 0

    @property
    def region(self) -> KVRegion:
        return self._source.region

    def accept(self, engine: Engine, submit: Submit) -> Accepted | Refused:
        request_id = submit.spec.request_id
        engine.add(submit.spec, output_limit=1 if submit.hand_over else None)
        if submit.hand_over:
            try:
                self._source.open(request_id)
            except (ValueError, TransferError) as error:
                engine.end(request_id)
                return _refused(request_id, error)
            self._open.add(request_id)
        return Accepted(request_id)

    def stepped(self, engine: Engine, outcome: StepOutcome) -> None:
        for progress in outcome.progress:
            if progress.is_finished:
                self._source.close(progress.request_id, FINISHED_AT_SOURCE)
                continue
            self._source.announce(
                progress.request_id,
                SourceProgress(
                    block_ids=progress.block_ids,
                    num_tokens=progress.num_computed_tokens,
                    is_last=bool(progress.token_ids),
                    token_ids=progress.token_ids,
                ),
            )

    def abort(self, engine: Engine, request_id: str) -> None:
        if request_id in self._open:
            self._source.close(request_id, "aborted")
        else:
            engine.end(request_id)

    def stop(self) -> None:
        self._source.stop()

    def _released(self, request_id: str) -> None:
        """From the source's threads: nobody reads the request's blocks any more."""
        self._schedule(lambda engine: self._end(engine, request_id))

    def _end(self, engine: Engine, request_id: str) -> None:
        self._open.discard(request_id)
        handed_over = engine.state_of(request_id) is RequestState.HANDED_OVER
        engine.end(request_id, RequestState.FINISHED if handed_over else RequestState.ABORTED)


class ReaderHandOver:
    """Decode side: reserves first, pulls what is missing, and goes on from whatever arrived whole.

    A pull that breaks off, whatever the reason, commits what was verified; the rest is computed here like anything
    else that is known but not computed.
    """

    def __init__(self, region: KVRegion, receiver: KVReceiver, schedule: Schedule) -> None:
        self._region = region
        self._receiver = receiver
        self._schedule = schedule
        self._pulls: dict[str, bool] = {}  # request id -> aborted meanwhile; from accept until settled
        self.bytes_total = 0
        self.bytes_per_s = 0.0
        self.failures_total = 0

    @property
    def region(self) -> KVRegion:
        return self._region

    def accept(self, engine: Engine, submit: Submit) -> Accepted | Refused:
        request_id = submit.spec.request_id
        if submit.pull_from is None:
            engine.add(submit.spec)
            return Accepted(request_id)
        difference = self._region.difference(submit.pull_from)
        if difference is not None:
            return Refused(
                request_id, RefusalKind.INCOMPATIBLE, f"KV of {submit.pull_from.worker_id} cannot be read: {difference}"
            )
        reservation = engine.reserve(submit.spec)
        if reservation is None:
            return Refused(request_id, RefusalKind.NO_ROOM, "no KV blocks free for the request")
        missing = reservation.block_ids[reservation.first_block :]
        try:
            self._receiver.pull(request_id, submit.pull_from, reservation.first_block, missing, self._pulled)
        except (ValueError, TransferError) as error:
            engine.end(request_id)
            return _refused(request_id, error)
        self._pulls[request_id] = False
        return Accepted(request_id, reservation.num_cached_tokens)

    def stepped(self, engine: Engine, outcome: StepOutcome) -> None:
        pass  # nobody reads from this side

    def abort(self, engine: Engine, request_id: str) -> None:
        if request_id in self._pulls:
            self._pulls[request_id] = True
            self._receiver.cancel(request_id)  # its blocks go when the pull is quiet
        else:
            engine.end(request_id)

    def stop(self) -> None:
        self._receiver.stop()

    def _pulled(self, result: PullResult) -> None:
        """From the receiver's threads: no block of the request will be written any more."""
        self._schedule(lambda engine: self._settle(engine, result))

    def _settle(self, engine: Engine, result: PullResult) -> None:
        aborted = self._pulls.pop(result.request_id)
        self.bytes_total += result.num_bytes
        if result.num_bytes and result.copying_s > 0:
            self.bytes_per_s = smoothed(self.bytes_per_s, result.num_bytes / result.copying_s)
        if aborted or result.reason == FINISHED_AT_SOURCE:
            engine.end(result.request_id)
            return
        if not result.complete:
            self.failures_total += 1
        engine.commit(
            result.request_id, result.num_tokens, result.token_ids if result.complete else (), result.transfer_s
        )


def _refused(request_id: str, error: ValueError | TransferError) -> Refused:
    """The transfer does not take the request: its id was used before, or the worker is being stopped."""
    kind = RefusalKind.DRAINING if isinstance(error, TransferError) else RefusalKind.INCOMPATIBLE
    return Refused(request_id, kind, str(error))
