"""Every error that crosses a layer. Each says what was wrong, with which value, and what to do about it."""

from __future__ import annotations


class EagleRayError(Exception):
    """Base of all errors that eagleray raises on purpose."""


class ConfigError(EagleRayError):
    """A configuration or checkpoint that cannot be served; raised at start, never per request."""

    def __init__(self, field: str, value: object, way_out: str) -> None:
        super().__init__(f"{field}={value!r}: {way_out}")
        self.field, self.value, self.way_out = field, value, way_out


class InvalidRequest(EagleRayError):
    """A request that is refused (HTTP 400). ``param`` names the field as the user wrote it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


class Overloaded(EagleRayError):
    """No room now (HTTP 429); ``retry_after_s`` is when it is worth asking again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.message, self.retry_after_s = message, retry_after_s


class ServiceUnavailable(EagleRayError):
    """No worker can take the request and the wait for one has passed its deadline (HTTP 503)."""


class WorkerLost(EagleRayError):
    """A worker's connection closed or it made no progress before its deadline; the request can go on elsewhere.

    ``engine_failed``: the worker says that computing is what it failed at, perhaps because of this very request.
    """

    def __init__(self, worker_id: str, reason: str, *, engine_failed: bool = False) -> None:
        super().__init__(f"worker {worker_id}: {reason}")
        self.worker_id, self.reason, self.engine_failed = worker_id, reason, engine_failed


class TransferError(EagleRayError):
    """KV blocks did not arrive whole and verified; what is missing is computed again."""


class TransportUnavailable(EagleRayError):
    """A transport cannot be used on this machine or between these two workers; the text says what is missing."""


class IllegalTransition(EagleRayError):
    """A request was moved along an edge that the state table does not have: a bug of ours."""


class IntegrityError(EagleRayError):
    """The block pool's accounts do not add up: a bug of ours."""
