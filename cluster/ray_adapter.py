"""The places where we lean on Serve's internals, all in one file: Ray is pinned, and a test guards each of them.

Tried with ray 2.60. A ``RequestRouter`` that merely returns candidates hangs when one parent request makes several
calls, because pending requests are indexed by an id that its calls inherit; one that settles the pending request
itself does not.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class ReplicaGone(Exception):
    """The replica that a call was meant for does not exist any more."""


class TargetedRouter(RequestRouter):
    """Sends a call with ``target=<replica id>`` to that replica, and any other to the first there is."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        assert pending_request is not None
        target = pending_request.kwargs.get("target")
        chosen = next(
            (replica for replica in candidate_replicas if target in (None, replica.replica_id.unique_id)), None
        )
        if not pending_request.future.done():
            self._remove_pending_request_from_indices(pending_request)
            if chosen is None:
                pending_request.future.set_exception(ReplicaGone(str(target)))
            else:
                pending_request.future.set_result(chosen)
        return [[chosen or candidate_replicas[0]]]  # must be neither empty nor an exception: the caller would wait on


def log_beside_serve(logger: logging.Logger) -> None:
    """In a replica: what ``logger`` and those below it say, from INFO on, goes into the replica's file among Serve's
    logs. Serve gives a file to its own logger only, and what others say below WARNING is lost."""
    logger.handlers[:] = logging.getLogger("ray.serve").handlers
    logger.setLevel(logging.INFO)
    logger.propagate = False


def replica_metadata(handle: DeploymentHandle[Any]) -> list[dict[str, Any]]:
    """What the running replicas of a deployment told of themselves (``record_replica_metadata``). No call is made:
    Serve pushes the list to every handle."""
    if not handle.is_initialized:
        handle._init()
    router = handle._router._asyncio_router.request_router  # type: ignore[union-attr]
    return [] if router is None else [replica.replica_metadata for replica in list(router.curr_replicas.values())]
