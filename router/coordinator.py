"""The router: from a request to the workers that serve it. Answers the HTTP front's ``GenerationService``."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final

import msgspec

from eagleray.core.block_hash import BlockHash, HashNamespace
from eagleray.core.clock import Clock
from eagleray.core.config import RouterConfig
from eagleray.core.errors import Overloaded
from eagleray.core.request import RequestSpec
from eagleray.core.snapshot import Role
from eagleray.router.generation import RoutedGeneration
from eagleray.router.journal import Journal
from eagleray.router.metrics import IngressMetrics
from eagleray.router.pending import PendingLoad
from eagleray.router.policies.rules import uncached_tokens
from eagleray.router.prefix_index.index import PrefixIndex
from eagleray.router.service import ServiceStatus
from eagleray.router.tracing import RequestTracer
from eagleray.router.view import ClusterView, Route, RoutingPolicy, RoutingRequest, WorkerView
from eagleray.router.waiting_line import WaitingLine
from eagleray.router.worker_client import WorkerClient, WorkerPool

# Until a transfer has been measured: what shared memory on one host gives at least.
DEFAULT_TRANSFER_BYTES_PER_S: Final = 1e9


@dataclass(frozen=True, slots=True)
class Placement:
    """A route, and how many tokens its prefill will compute as far as the index knows."""

    route: Route
    tokens_to_compute: int


class Coordinator:
    """Admits requests, chooses workers, follows each request to its end. One per ingress, on its event loop."""

    def __init__(
        self,
        pool: WorkerPool,
        policy: RoutingPolicy,
        index: PrefixIndex,
        config: RouterConfig,
        clock: Clock,
        metrics: IngressMetrics,
        tracer: RequestTracer,
        on_placed: Callable[[str, str], None] = lambda worker_id, request_id: None,
    ) -> None:
        """``on_placed(worker_id, request_id)`` hears of each request that a worker has accepted."""
        self.pool, self.config, self.clock, self.metrics, self.tracer = pool, config, clock, metrics, tracer
        self.on_placed = on_placed
        self._policy, self._index = policy, index
        self._sequence = itertools.count()
        self._attempt_numbers = itertools.count(1)
        self.pending = PendingLoad()
        self.line = WaitingLine(clock)
        self._max_model_tokens: int | None = None  # smallest that a worker has told; stays while workers come and go
        self.num_queued = 0
        self.num_running = 0

    # ---- the HTTP front's side

    def generate(self, spec: RequestSpec, already_s: float = 0.0) -> RoutedGeneration:
        """Raises ``Overloaded`` when too many requests wait already."""
        if self.num_queued >= self.config.max_queued:
            raise Overloaded(
                f"{self.num_queued} requests are waiting for a worker; try again later.", self._retry_after_s()
            )
        return RoutedGeneration(self, with_seed(spec), already_s)

    def status(self) -> ServiceStatus:
        clients = self.pool.workers().values()
        decode = [client for client in clients if client.welcome.role is Role.DECODE]
        index = self._index.status()
        told = [client.welcome.max_model_tokens for client in clients]
        self._max_model_tokens = min([*told, self._max_model_tokens or told[0]]) if told else self._max_model_tokens
        return ServiceStatus(
            ready=bool(decode),
            reason="" if decode else "no decode worker is connected yet",
            max_model_tokens=self._max_model_tokens,
            workers=tuple(client.snapshot for client in clients),
            num_queued=self.num_queued,
            num_running=self.num_running,
            prefix_index=f"{index.backend}: {index.state}" + (f" ({index.last_error})" if index.state != "up" else ""),
        )

    def metrics_text(self) -> str:
        snapshots = [client.snapshot for client in self.pool.workers().values()]
        return self.metrics.text(snapshots, self.num_queued, self.num_running, self._index.status().state == "up")

    # ---- the generation's side

    async def choose(self, journal: Journal, refused: Mapping[str, int]) -> Placement | None:
        """Where the journal's request should go now; None when there is no worker for it. ``refused``: worker id ->
        number of the snapshot at which it did not take the request; it is asked again when it has sent another one."""
        clients = {
            worker_id: client
            for worker_id, client in sorted(self.pool.workers().items())
            if refused.get(worker_id) != client.snapshot.number and self._answers_in_time(client)
        }
        request = journal.request
        decode = [client for client in clients.values() if client.welcome.role is Role.DECODE]
        if not decode:
            return None
        reads_cache = request.spec.sampling.prompt_logprobs is None
        cached = await self._index.lookup(await self._hashes(journal, decode[0])) if reads_cache else {}
        layout = decode[0].welcome.region.layout
        sampling = request.spec.sampling
        routing = RoutingRequest(
            num_tokens=request.num_tokens,
            max_new_tokens=sampling.max_tokens or decode[0].welcome.max_model_tokens - request.num_tokens,
            block_size_tokens=layout.block_size_tokens,
            sequence=next(self._sequence),
            reads_cache=reads_cache,
        )
        view = self._view(clients, cached, layout.block_size_tokens, layout.block_bytes)
        route = self._choose_route(routing, view, clients)
        if route is None:
            return None
        computing = view.decode[route.decode] if route.prefill is None else view.prefill[route.prefill]
        return Placement(route, uncached_tokens(routing, computing))

    def new_attempt_id(self, spec: RequestSpec) -> str:
        """Never the same again, even if a caller uses a request id twice."""
        return f"{spec.request_id}.{spec.choice}.{next(self._attempt_numbers)}"

    # ---- parts

    def _answers_in_time(self, client: WorkerClient) -> bool:
        """A worker takes requests between two steps: in a step that is long already it would miss the deadline."""
        return client.snapshot.step_running_s < self.config.submit_deadline_s

    def _choose_route(
        self, routing: RoutingRequest, view: ClusterView, clients: Mapping[str, WorkerClient]
    ) -> Route | None:
        """As the policy says, among prefill workers whose KV its decode worker can read: while workers are replaced
        one by one, some may have another draft than others."""
        route = self._policy.choose(routing, view)
        if route is None or route.prefill is None:
            return route
        region = clients[route.decode].welcome.region
        difference = region.difference(clients[route.prefill].welcome.region)
        if difference is None:
            return route
        readable = {
            worker_id: worker
            for worker_id, worker in view.prefill.items()
            if region.difference(clients[worker_id].welcome.region) is None
        }
        decode = {route.decode: view.decode[route.decode]}
        again = self._policy.choose(routing, replace(view, prefill=readable, decode=decode))
        return again and replace(again, reason=f"{again.reason}; KV of {route.prefill} cannot be read: {difference}")

    async def _hashes(self, journal: Journal, client: WorkerClient) -> Sequence[BlockHash]:
        region, layout = client.welcome.region, client.welcome.region.layout
        namespace = HashNamespace(
            region.model_identity, layout.block_size_tokens, layout.digest(), region.draft_identity
        )
        root = namespace.root(journal.request.spec.tenant_salt)
        return await journal.block_hashes(root, layout.block_size_tokens)

    def _view(
        self, clients: Mapping[str, WorkerClient], cached: Mapping[str, int], block_size_tokens: int, block_bytes: int
    ) -> ClusterView:
        def views(role: Role) -> dict[str, WorkerView]:
            return {
                worker_id: self._worker_view(client, cached.get(worker_id, 0) * block_size_tokens)
                for worker_id, client in clients.items()
                if client.welcome.role is role
            }

        rates = (client.snapshot.transfer_bytes_per_s for client in clients.values())
        measured = [rate for rate in rates if rate > 0]
        return ClusterView(
            prefill=views(Role.PREFILL),
            decode=views(Role.DECODE),
            block_bytes=block_bytes,
            local_prefill_tokens=self.config.local_prefill_tokens,
            transfer_bytes_per_s=fmean(measured) if measured else DEFAULT_TRANSFER_BYTES_PER_S,
        )

    def _worker_view(self, client: WorkerClient, cached_tokens: int) -> WorkerView:
        snapshot = client.snapshot
        pending = self.pending.on(snapshot.worker_id, snapshot)
        return WorkerView(
            snapshot, cached_tokens, pending.num_requests, pending.tokens_to_compute, pending.tokens_to_hold
        )

    def _retry_after_s(self) -> float:
        """As long as requests are seen to wait for a worker now."""
        return max(1.0, self.line.wait_s)


def with_seed(spec: RequestSpec) -> RequestSpec:
    """Drawn here where the user gave none, so that every worker that ever continues the request knows it."""
    if spec.sampling.seed is not None:
        return spec
    return msgspec.structs.replace(spec, sampling=msgspec.structs.replace(spec.sampling, seed=secrets.randbits(62)))
