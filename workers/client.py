"""The ingress's end of the direct channel: one connection to one worker, shared by all its requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from eagleray.core.errors import WorkerLost
from eagleray.core.messages import (
    PROTOCOL_VERSION,
    Abort,
    Accepted,
    CacheChanges,
    Failed,
    Hello,
    Ping,
    Refused,
    StepOutputs,
    Submit,
    ToIngress,
    ToWorker,
    Welcome,
)
from eagleray.core.snapshot import WorkerSnapshot
from eagleray.router.worker_client import Sink, SubmitRefused
from eagleray.workers.frames import ChannelError, FrameReader, encode_frame

PING_INTERVAL_S: Final = 1.0  # a worker ends a connection that says nothing for several of them


OnCacheChanges = Callable[["ChannelClient", CacheChanges], Awaitable[None]]


async def _ignored(client: ChannelClient, changes: CacheChanges) -> None:
    """For an ingress that learns of caches elsewhere."""


class ChannelClient:
    """A ``router.worker_client.WorkerClient`` over TCP. Made by ``connect``; lives until the connection ends or the
    worker stays silent (not even a snapshot) for ``stall_deadline_s``: a stopped process does not close its sockets."""

    def __init__(
        self,
        welcome: Welcome,
        frames: FrameReader,
        writer: asyncio.StreamWriter,
        *,
        submit_deadline_s: float,
        stall_deadline_s: float,
        on_change: Callable[[], None],
        on_cache_changes: OnCacheChanges,
    ) -> None:
        self.welcome = welcome
        self.snapshot: WorkerSnapshot = welcome.snapshot
        self._frames, self._writer = frames, writer
        self._submit_deadline_s, self._stall_deadline_s = submit_deadline_s, stall_deadline_s
        self._on_change, self._on_cache_changes = on_change, on_cache_changes
        self._sinks: dict[str, Sink] = {}
        self._replies: dict[str, asyncio.Future[Accepted | Refused]] = {}
        self._lost: WorkerLost | None = None
        self._pinging = asyncio.create_task(self._ping())
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls,
        address: str,
        ingress_id: str,
        *,
        submit_deadline_s: float,
        stall_deadline_s: float,
        on_change: Callable[[], None],
        on_cache_changes: OnCacheChanges = _ignored,
    ) -> ChannelClient:
        """Raises ``WorkerLost`` when the worker does not answer before ``submit_deadline_s``."""
        host, _, port = address.rpartition(":")
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(submit_deadline_s):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(encode_frame(Hello(ingress_id)))
                frames = FrameReader(reader, ToIngress)
                welcome = await frames.next()
            return cls(
                _checked(welcome, address),
                frames,
                writer,
                submit_deadline_s=submit_deadline_s,
                stall_deadline_s=stall_deadline_s,
                on_change=on_change,
                on_cache_changes=on_cache_changes,
            )
        except BaseException as error:
            if writer is not None:
                writer.close()
            if isinstance(error, OSError | ChannelError):  # TimeoutError is an OSError
                raise WorkerLost(address, f"no connection: {str(error) or 'no answer in time'}") from None
            raise

    @property
    def is_lost(self) -> bool:
        return self._lost is not None

    @property
    def has_requests(self) -> bool:
        """Whether any request waits for something from here."""
        return bool(self._sinks)

    def serves(self, request_id: str) -> bool:
        """Whether something is still to come from here for the request."""
        return request_id in self._sinks

    async def submit(self, submit: Submit, sink: Sink) -> Accepted:
        request_id = submit.spec.request_id
        reply: asyncio.Future[Accepted | Refused] = asyncio.get_running_loop().create_future()
        self._replies[request_id] = reply
        self._sinks[request_id] = sink
        accepted = False
        try:
            self._send(submit)
            async with asyncio.timeout(self._submit_deadline_s):
                answer = await reply
            if isinstance(answer, Refused):
                raise SubmitRefused(self.welcome.worker_id, answer.kind, answer.reason)
            accepted = True
            return answer
        except TimeoutError:
            raise WorkerLost(self.welcome.worker_id, f"no answer to a submit in {self._submit_deadline_s} s") from None
        finally:
            self._replies.pop(request_id, None)
            if not accepted:
                self.abort(request_id)

    def abort(self, request_id: str) -> None:
        if self._sinks.pop(request_id, None) is not None and self._lost is None:
            self._send(Abort(request_id))

    async def wait_lost(self, deadline_s: float | None = None) -> None:
        """Return when the connection has ended, or after ``deadline_s``."""
        await asyncio.wait([self._task], timeout=deadline_s)

    async def aclose(self) -> None:
        """End the connection; the worker aborts what was left."""
        for task in (self._pinging, self._task):
            task.cancel()
        await asyncio.gather(self._pinging, self._task, return_exceptions=True)
        self._writer.transport.abort()  # a task that is cancelled before it begins does not

    def _send(self, message: ToWorker) -> None:
        if self._lost is not None:
            raise self._lost
        self._writer.write(encode_frame(message))

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_INTERVAL_S)
            self._send(Ping())

    async def _read(self) -> None:
        reason, failed = "the connection closed", False
        try:
            while not failed:
                if (message := await self._next()) is None:
                    break
                if isinstance(message, Failed):
                    reason, failed = message.reason, True
                elif isinstance(message, CacheChanges):
                    await self._on_cache_changes(self, message)
                else:
                    self._take(message)
        except TimeoutError:
            reason = f"silent for {self._stall_deadline_s} s"
        except ChannelError as error:
            reason = str(error)
        finally:
            self._pinging.cancel()
            self._writer.transport.abort()
            self._give_up(WorkerLost(self.welcome.worker_id, reason, engine_failed=failed))

    async def _next(self) -> ToIngress | None:
        message: ToIngress | None
        if self._frames.has_next:
            message = await self._frames.next()
        else:
            async with asyncio.timeout(self._stall_deadline_s):
                message = await self._frames.next()
        return message

    def _take(self, message: Welcome | Accepted | Refused | StepOutputs) -> None:
        if isinstance(message, Accepted | Refused):
            reply = self._replies.get(message.request_id)
            if reply is not None and not reply.done():
                reply.set_result(message)
        elif isinstance(message, StepOutputs):
            for output in message.outputs:
                sink = self._sinks.get(output.request_id)
                if sink is not None:
                    if output.finish_reason is not None:
                        del self._sinks[output.request_id]
                    sink(output)
            # The worker's channel may repeat the one before while its step thread tells the newest.
            if message.snapshot is not None and message.snapshot.number >= self.snapshot.number:
                self.snapshot = message.snapshot
                self._on_change()

    def _give_up(self, lost: WorkerLost) -> None:
        self._lost = lost
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(lost)
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(lost)
        self._on_change()


def _checked(welcome: object, address: str) -> Welcome:
    if not isinstance(welcome, Welcome):
        raise WorkerLost(address, "the other side is not a worker")
    if welcome.protocol != PROTOCOL_VERSION:
        raise WorkerLost(address, f"it speaks protocol {welcome.protocol}, we {PROTOCOL_VERSION}: update both")
    return welcome
