"""Load that this ingress has sent to workers and that their snapshots do not show yet.

Snapshots are a tenth of a second old; a burst that looked at them alone would go to one worker as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from eagleray.core.snapshot import WorkerSnapshot


@dataclass(frozen=True, slots=True)
class Load:
    """Of one worker: requests, the tokens that it has to compute for them, and those that it has to hold."""

    num_requests: int = 0
    tokens_to_compute: int = 0
    tokens_to_hold: int = 0


@dataclass(slots=True)
class _Sent:
    tokens_to_compute: int
    tokens_to_hold: int
    accepted_under: int | None = None  # number of the worker's newest snapshot when its acceptance came


@dataclass(slots=True)
class PendingLoad:
    """A request counts from the moment it is routed until the worker's next snapshot after it has accepted."""

    _sent: dict[str, dict[str, _Sent]] = field(default_factory=dict)  # worker id -> request id -> load

    def note_sent(self, worker_id: str, request_id: str, tokens_to_compute: int, tokens_to_hold: int) -> None:
        self._sent.setdefault(worker_id, {})[request_id] = _Sent(tokens_to_compute, tokens_to_hold)

    def note_accepted(self, worker_id: str, request_id: str, newest: WorkerSnapshot) -> None:
        sent = self._sent.get(worker_id, {}).get(request_id)
        if sent is not None:
            sent.accepted_under = newest.number

    def forget(self, request_id: str) -> None:
        """It has ended, or was not taken."""
        for worker_id in list(self._sent):
            self._sent[worker_id].pop(request_id, None)
            if not self._sent[worker_id]:
                del self._sent[worker_id]

    def on(self, worker_id: str, newest: WorkerSnapshot) -> Load:
        """What the worker's snapshot ``newest`` lacks. A worker sends them in order, so one that came after the
        acceptance includes the request."""
        sent = self._sent.get(worker_id, {})
        shown = [name for name, one in sent.items() if one.accepted_under not in (None, newest.number)]
        for request_id in shown:
            del sent[request_id]
        return Load(
            len(sent),
            sum(one.tokens_to_compute for one in sent.values()),
            sum(one.tokens_to_hold for one in sent.values()),
        )
