"""How the router speaks to one worker: the seam between decisions and connections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from eagleray.core.errors import EagleRayError, WorkerLost
from eagleray.core.messages import Accepted, RefusalKind, Submit, TokenOutput, Welcome
from eagleray.core.snapshot import WorkerSnapshot

# What a request hears from a worker after it was accepted: its tokens, or that the worker is gone.
Sink = Callable[[TokenOutput | WorkerLost], None]


class SubmitRefused(EagleRayError):
    """The worker does not take the request; ``kind`` tells whether another one, or a later try, might."""

    def __init__(self, worker_id: str, kind: RefusalKind, reason: str) -> None:
        super().__init__(f"worker {worker_id}: {reason}")
        self.worker_id, self.kind, self.reason = worker_id, kind, reason


class WorkerClient(Protocol):
    """A connected worker."""

    @property
    def welcome(self) -> Welcome: ...

    @property
    def snapshot(self) -> WorkerSnapshot:
        """The newest one received."""
        ...

    async def submit(self, submit: Submit, sink: Sink) -> Accepted:
        """Hand a request over; from then on its outputs go to ``sink``, in order, on the caller's event loop.

        Raises ``SubmitRefused``, or ``WorkerLost`` when there is no answer before the deadline.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Free everything of the request there; its sink hears nothing more. Idempotent; never waits."""
        ...


class WorkerPool(Protocol):
    """The workers that this ingress is connected to."""

    def workers(self) -> Mapping[str, WorkerClient]: ...

    async def wait_for_change(self, deadline_s: float) -> None:
        """Return when a worker came, went or sent a snapshot, or after ``deadline_s``."""
        ...
