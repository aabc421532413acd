"""What the HTTP front asks of the router. The front knows nothing of workers, pools or Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from eagleray.core.messages import TokenOutput
from eagleray.core.request import RequestSpec
from eagleray.core.snapshot import WorkerSnapshot
from eagleray.core.telemetry import TimeAccount


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests can be served now, and by whom."""

    ready: bool
    reason: str = ""  # why not, when not ready
    max_model_tokens: int | None  # prompt plus output; None until a worker has told
    workers: tuple[WorkerSnapshot, ...] = ()
    num_queued: int = 0  # requests waiting in this ingress for a worker
    num_running: int = 0  # requests that a worker has
    prefix_index: str = ""  # state of the cluster's prefix index, for people


class Generation(Protocol):
    """One request under way, with all its choices."""

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        """Outputs of all choices (``TokenOutput.choice``), each choice in order of ``position`` and without doubles;
        the last of a choice has ``finish_reason``. Ends after the last choice. Iterate once.

        Raises ``InvalidRequest``, ``Overloaded`` or ``ServiceUnavailable``.
        """
        ...

    async def aclose(self) -> None:
        """Abort what still runs and free it everywhere. Harmless after the end and when called again."""
        ...

    @property
    def account(self) -> TimeAccount | None:
        """Where the time went; None before the end."""
        ...


class GenerationService(Protocol):
    """Answers requests."""

    def generate(self, spec: RequestSpec, already_s: float = 0.0) -> Generation:
        """Start ``spec.sampling.n`` choices for the prompt ``spec.token_ids``. The request arrived ``already_s`` ago,
        and its time account begins there."""
        ...

    def status(self) -> ServiceStatus:
        """Cheap: asked for every request."""
        ...

    def metrics_text(self) -> str:
        """Metrics in the Prometheus text format."""
        ...
