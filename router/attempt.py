"""One try of one choice on one decode worker, with or without a prefill worker, and how many tries there may be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eagleray.core.errors import ServiceUnavailable, WorkerLost
from eagleray.core.messages import Submit, TokenOutput
from eagleray.core.request import RequestSpec
from eagleray.core.snapshot import Role
from eagleray.router.journal import Journal
from eagleray.router.worker_client import WorkerClient

if TYPE_CHECKING:
    from eagleray.router.coordinator import Coordinator, Placement


class AttemptBudget:
    """What a request may cost before it is given up.

    Attempts count since the last new token, so a long answer may outlive many workers. Engines that failed with it
    count for ever: if it is the request that breaks them, it breaks ``max_attempts`` of them and no more, though each
    may have said a token before.
    """

    def __init__(self, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._num_attempts = 0  # since the last new token
        self._num_failures = 0

    def begin(self) -> None:
        """Before an attempt. Raises ``ServiceUnavailable`` when there were enough."""
        if self._num_attempts == self._max_attempts:
            raise ServiceUnavailable(
                f"The request was lost by {self._num_attempts} workers in a row without a new token; try again later."
            )
        self._num_attempts += 1

    def note_token(self) -> None:
        self._num_attempts = 0

    def note_lost(self, lost: WorkerLost) -> None:
        """Raises ``ServiceUnavailable`` when the request has had its share of engines."""
        self._num_failures += lost.engine_failed
        if self._num_failures == self._max_attempts:
            raise ServiceUnavailable(
                f"{self._num_failures} workers failed while they computed the request; the last one: {lost.reason}."
            )


@dataclass(slots=True)
class Waits:
    """How long one choice has waited for workers, over all its attempts."""

    answer_s: dict[Role, float] = field(default_factory=lambda: dict.fromkeys(Role, 0.0))  # to whether they accept it
    first_step_s: float = 0.0  # on those that had accepted


class Attempt:
    """One try. ``submit``, then ``follow``, then in any case ``end``."""

    def __init__(self, coordinator: Coordinator, spec: RequestSpec, waits: Waits) -> None:
        self._coordinator = coordinator
        self._spec = spec
        self._waits = waits
        self._take: Callable[[TokenOutput | WorkerLost], None] | None = None  # while it is followed
        self._early: list[TokenOutput | WorkerLost] = []  # what came before
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._accepted: list[WorkerClient] = []
        self._heard_s = 0.0  # when something came last, on the loop's clock
        self._alarm: asyncio.TimerHandle | None = None

    async def submit(self, placement: Placement) -> None:
        """Reserve on the decode worker, then start the prefill. Raises ``SubmitRefused`` or ``WorkerLost``; then
        nothing is left anywhere."""
        route, workers = placement.route, self._coordinator.pool.workers()
        decode = workers.get(route.decode)
        prefill = workers.get(route.prefill) if route.prefill is not None else None
        if decode is None or (route.prefill is not None and prefill is None):
            raise WorkerLost(route.decode if decode is None else str(route.prefill), "it has just gone")
        self._note_sent(placement)
        try:
            if prefill is None:
                await self._submit(decode, Submit(self._spec))
            else:
                await self._submit(decode, Submit(self._spec, pull_from=prefill.welcome.region))
                await self._submit(prefill, Submit(self._spec, hand_over=True))
        except BaseException:
            self.end()
            raise

    def _note_sent(self, placement: Placement) -> None:
        """Before anything is waited for: the next request is routed knowing of this one."""
        route, num_tokens = placement.route, len(self._spec.token_ids)
        note = self._coordinator.pending.note_sent
        if route.prefill is None:
            note(route.decode, self._spec.request_id, placement.tokens_to_compute, num_tokens)
        else:
            note(route.prefill, self._spec.request_id, placement.tokens_to_compute, num_tokens)
            note(route.decode, self._spec.request_id, 0, num_tokens)

    async def _submit(self, client: WorkerClient, submit: Submit) -> None:
        clock, role = self._coordinator.clock, client.welcome.role
        asked_s = clock.now_s()
        try:
            await client.submit(submit, self._hear)
        finally:
            self._waits.answer_s[role] += clock.now_s() - asked_s
        self._accepted.append(client)
        worker_id, request_id = client.welcome.worker_id, submit.spec.request_id
        self._coordinator.pending.note_accepted(worker_id, request_id, client.snapshot)
        self._coordinator.on_placed(worker_id, request_id)

    async def follow(self, journal: Journal, budget: AttemptBudget, emit: Callable[[TokenOutput], None]) -> None:
        """Until ``journal`` has everything. ``emit`` gets what is new and in order at once, as it comes from either
        worker: no task has to be woken for it.

        A lost prefill worker is the decode worker's affair: its pull breaks off and it computes what is missing. Only
        if it had taken over already, and the first token was lost on its way here, nobody will say that token again.

        Raises ``WorkerLost``, and ``ServiceUnavailable`` when that was one too many.
        """
        decode_id = self._accepted[0].welcome.worker_id
        prefill_is_there = len(self._accepted) > 1

        def take(item: TokenOutput | WorkerLost) -> None:
            nonlocal prefill_is_there
            if isinstance(item, TokenOutput):
                for new in journal.take(item):
                    emit(new)
                if journal.is_finished:
                    self._over.set_result(None)
                    return
            else:
                budget.note_lost(item)
                if item.worker_id == decode_id:
                    raise item
                prefill_is_there = False
            may_be_filled = prefill_is_there and journal.request.num_tokens == len(self._spec.token_ids)
            if journal.has_gap and not may_be_filled:
                raise WorkerLost(decode_id, "tokens are missing that no worker will say again")

        self._take = take
        early, self._early = self._early, []
        for item in early:
            self._hear(item)
        self._heard_s = asyncio.get_running_loop().time()
        self._watch_silence(decode_id)
        await self._over

    def _hear(self, item: TokenOutput | WorkerLost) -> None:
        """The workers' sink: what goes wrong here is the attempt's, not the connection's."""
        if self._over.done():
            return
        if self._take is None:
            self._early.append(item)
            return
        self._heard_s = asyncio.get_running_loop().time()
        try:
            self._take(item)
        except Exception as error:
            self._over.set_exception(error)

    def _watch_silence(self, decode_id: str) -> None:
        """One timer for the whole attempt, rather than one for each wait."""
        silence_s, loop = self._coordinator.config.silence_deadline_s, asyncio.get_running_loop()
        left_s = self._heard_s + silence_s - loop.time()
        if left_s <= 0:
            self._hear(WorkerLost(decode_id, f"no token for {silence_s} s"))
        else:
            self._alarm = loop.call_later(left_s, self._watch_silence, decode_id)

    def end(self) -> None:
        """Leave nothing behind on any worker. Workers that have ended the request ignore it."""
        if not self._over.cancel() and not self._over.cancelled():  # from here on nothing is heard
            self._over.exception()  # known, or of no interest to who has hung up: nobody need be warned of it
        if self._alarm is not None:
            self._alarm.cancel()
        self._coordinator.pending.forget(self._spec.request_id)
        for client in self._accepted:
            with contextlib.suppress(WorkerLost):  # and the request with it
                client.abort(self._spec.request_id)
        self._accepted.clear()
