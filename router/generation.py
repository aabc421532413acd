"""One request from admission to its last token, whatever happens to the workers on the way.

Each choice runs *attempts*. An attempt reserves on a decode worker, prefills (there, or on a prefill worker that the
decode worker pulls from) and passes tokens on. A lost worker ends the attempt; the next one starts with all that was
emitted as known tokens. The journal drops what comes twice. There is nothing else to recover.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.errors import InvalidRequest, ServiceUnavailable, WorkerLost
from eagleray.core.messages import RefusalKind, TokenOutput, merged
from eagleray.core.request import RequestSpec
from eagleray.core.snapshot import Role
from eagleray.core.telemetry import Phase, PhaseClock, QueueParts, TimeAccount
from eagleray.router.attempt import Attempt, AttemptBudget, Waits
from eagleray.router.journal import Journal
from eagleray.router.mailbox import Mailbox
from eagleray.router.view import Route
from eagleray.router.worker_client import SubmitRefused

if TYPE_CHECKING:
    from eagleray.router.coordinator import Coordinator

_Item = TokenOutput | BaseException | None  # None: this choice has ended


class RoutedGeneration:
    """A ``router.service.Generation``: merges the choices of one request, which arrived ``already_s`` ago."""

    def __init__(self, coordinator: Coordinator, spec: RequestSpec, already_s: float) -> None:
        self._coordinator = coordinator
        self.phases = PhaseClock(coordinator.clock, already_s)
        self._already_s = already_s
        self._spec = spec
        self._items: Mailbox[_Item] = Mailbox()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_closed = False
        self._first_token_s: float | None = None
        self._num_output_tokens = 0
        self._num_cached_tokens: int | None = None
        self._acceptance: Acceptance | None = None
        self._answers = [
            Answer(coordinator, msgspec.structs.replace(spec, choice=choice), self.phases if choice == 0 else None)
            for choice in range(spec.sampling.n)
        ]
        self.account: TimeAccount | None = None

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self._outputs()

    async def _outputs(self) -> AsyncIterator[TokenOutput]:
        if self._is_closed:
            return
        self._start(self._answers[0])
        running, outcome = 1, "aborted"
        try:
            while running:
                items = await self._items.take()
                if self._is_closed:
                    return  # type: ignore[unreachable]  # mypy forgets that others run during an await
                outputs = [item for item in items if isinstance(item, TokenOutput)]
                for output in _merged_by_choice(outputs):
                    if len(self._tasks) == 1 and len(self._answers) > 1:
                        # The prompt is computed and cached now; the other choices find it.
                        for answer in self._answers[1:]:
                            self._start(answer)
                        running += len(self._answers) - 1
                    self._note(output)
                    yield output
                    if self._is_closed:
                        return  # type: ignore[unreachable]
                for item in items:
                    if isinstance(item, BaseException):
                        outcome = "error"
                        raise item
                running -= items.count(None)
            outcome = "finished"
        finally:
            await self._end(outcome)

    async def aclose(self) -> None:
        await self._end("aborted")

    async def _end(self, outcome: str) -> None:
        self._is_closed = True
        self._items.put(None)  # for whoever waits: a task that is cancelled before it begins says nothing
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._close_account(outcome)

    def _start(self, answer: Answer) -> None:
        self._tasks.append(asyncio.create_task(self._follow(answer)))

    async def _follow(self, answer: Answer) -> None:
        try:
            await answer.run(self._items.put)
        except Exception as error:
            self._items.put(error)
        finally:
            self._items.put(None)

    def _note(self, output: TokenOutput) -> None:
        self._coordinator.metrics.note_tokens(output)
        self._num_output_tokens += len(output.token_ids)
        if output.acceptance is not None:
            self._acceptance = total_acceptance((self._acceptance, output.acceptance))
        if self._first_token_s is None:
            self._first_token_s = self.phases.elapsed_s
        if self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens

    def _close_account(self, outcome: str) -> None:
        if self.account is not None:
            return
        self.phases.mark(Phase.QUEUE if self._first_token_s is None else Phase.DECODE)
        first, spent_s = self._answers[0], self.phases.spent_s()
        self.account = TimeAccount.from_phases(
            spent_s,
            total_s=self.phases.elapsed_s,
            time_to_first_token_s=self._first_token_s,
            num_prompt_tokens=self._spec.num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens or 0,
            num_output_tokens=self._num_output_tokens,
            prefill_worker=first.route.prefill if first.route else None,
            decode_worker=first.route.decode if first.route else None,
            attempts=first.num_attempts,
            route_reason=first.route.reason if first.route else "",
            queue=self._queue_parts(spent_s[Phase.QUEUE], first.waits),
            acceptance=self._acceptance,
        )
        self._coordinator.metrics.note_end(self.account, outcome)
        self._coordinator.tracer.record(self._spec, self.phases, self.account, outcome)

    def _queue_parts(self, queue_s: float, waits: Waits) -> QueueParts:
        """What has no clock of its own is routing, waiting included."""
        decode_s, prefill_s = waits.answer_s[Role.DECODE], waits.answer_s[Role.PREFILL]
        known_s = self._already_s + decode_s + prefill_s + waits.first_step_s
        return QueueParts(
            read_s=self._already_s,
            route_s=max(0.0, queue_s - known_s),
            decode_accept_s=decode_s,
            prefill_accept_s=prefill_s,
            first_step_s=waits.first_step_s,
        )


class Answer:
    """One choice of a request: attempts until it has ended."""

    def __init__(self, coordinator: Coordinator, spec: RequestSpec, phases: PhaseClock | None) -> None:
        self._coordinator = coordinator
        self._config = coordinator.config
        self._phases = phases  # of the request's first choice; the others' time runs beside it
        self._journal = Journal(spec, coordinator.clock.now_s())
        self._budget = AttemptBudget(coordinator.config.max_attempts)
        self._ticket = coordinator.line.new_ticket()
        self._refused: dict[str, int] = {}  # worker id -> number of its snapshot when it refused or was lost
        self._why_refused = "no worker is connected"
        self.waits = Waits()
        self.num_attempts = 0
        self.route: Route | None = None

    async def run(self, emit: Callable[[TokenOutput], None]) -> None:
        """``emit`` new outputs in order, to the one with ``finish_reason``."""

        def emit_marked(output: TokenOutput) -> None:
            self._budget.note_token()
            self._mark(output)
            emit(output)

        while not self._journal.is_finished:
            self._budget.begin()
            self.num_attempts += 1
            if self.num_attempts > 1:
                self._coordinator.metrics.note_resumed()
            attempt = await self._place()
            self._coordinator.num_running += 1
            try:
                await attempt.follow(self._journal, self._budget, emit_marked)
            except WorkerLost:
                continue  # what was emitted is known; go on from there
            finally:
                self._coordinator.num_running -= 1
                attempt.end()
                self._journal.forget_early()

    def _new_attempt(self) -> Attempt:
        """Each try has an id of its own: what a refused or lost one left on a worker may still be going away."""
        request_id = self._coordinator.new_attempt_id(self._journal.request.spec)
        return Attempt(self._coordinator, self._journal.request.continuation(request_id), self.waits)

    async def _place(self) -> Attempt:
        """Find workers that accept, waiting for some if need be. Raises ``ServiceUnavailable`` after the deadline."""
        coordinator = self._coordinator
        deadline_s = coordinator.clock.now_s() + self._config.queue_deadline_s
        coordinator.num_queued += 1
        try:
            attempt = None if coordinator.line else await self._try_workers()
            return attempt or await self._wait_in_line(deadline_s)
        finally:
            coordinator.num_queued -= 1

    async def _wait_in_line(self, deadline_s: float) -> Attempt:
        """Behind those that came before; as the first, try again whenever a worker has told something new."""
        clock = self._coordinator.clock
        try:
            async with self._coordinator.line.first(self._ticket, deadline_s - clock.now_s()):
                while (attempt := await self._try_workers()) is None:
                    left_s = deadline_s - clock.now_s()
                    if left_s <= 0:
                        raise self._unplaced(self._why_refused)
                    await self._coordinator.pool.wait_for_change(left_s)
                return attempt
        except TimeoutError:
            raise self._unplaced("others have waited for longer") from None

    def _unplaced(self, reason: str) -> ServiceUnavailable:
        return ServiceUnavailable(f"No worker could take the request in {self._config.queue_deadline_s} s: {reason}.")

    async def _try_workers(self) -> Attempt | None:
        """An attempt that workers have accepted; None when none does now. One that refused, or did not answer, is asked
        again when its snapshot is another one. Raises ``InvalidRequest`` when a worker says so."""
        while (placement := await self._coordinator.choose(self._journal, self._refused)) is not None:
            attempt = self._new_attempt()
            # Of the moment before: a snapshot that comes while it waits for the answer may tell of room already.
            numbers = {
                worker_id: client.snapshot.number for worker_id, client in self._coordinator.pool.workers().items()
            }
            try:
                await attempt.submit(placement)
            except SubmitRefused as error:
                if error.kind is RefusalKind.INVALID:
                    raise InvalidRequest(error.reason) from None
                self._note_refused(error.worker_id, error.reason, numbers)
            except WorkerLost as error:
                self._budget.note_lost(error)
                self._note_refused(error.worker_id, error.reason, numbers)
            else:
                if self._phases is not None:
                    self._phases.mark(Phase.QUEUE)
                self.route = placement.route
                return attempt
        return None

    def _note_refused(self, worker_id: str, reason: str, numbers: Mapping[str, int]) -> None:
        self._why_refused = reason
        if worker_id in numbers:
            self._refused[worker_id] = numbers[worker_id]

    def _mark(self, output: TokenOutput) -> None:
        """Attribute the time since the last output: as the worker says where it has just begun, else to decoding."""
        if self._phases is None:
            return
        if output.timing is None:
            self._phases.mark(Phase.DECODE)
            return
        computing = Phase.PREFILL if output.position == 0 else Phase.DECODE
        queued_s = self._phases.spent_s()[Phase.QUEUE]
        self._phases.mark(
            Phase.NETWORK,
            {
                Phase.TRANSFER: output.timing.transfer_s,
                Phase.QUEUE: output.timing.queue_s,
                computing: output.timing.prefill_s,
            },
        )
        self.waits.first_step_s += self._phases.spent_s()[Phase.QUEUE] - queued_s


def _merged_by_choice(outputs: list[TokenOutput]) -> list[TokenOutput]:
    """What has come at a time, joined: a reader that is behind is told less often."""
    if len(outputs) < 2:
        return outputs
    by_choice: dict[int, list[TokenOutput]] = {}
    for output in outputs:
        by_choice.setdefault(output.choice, []).append(output)
    return [joined for of_choice in by_choice.values() for joined in merged(of_choice)]
