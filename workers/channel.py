"""The worker's end of the direct channel: ingresses connect, submit and abort; tokens go out, one message per step.

Listens on an event loop in a thread of its own, so that neither a long step nor whatever else the process does delays
it. Messages are sent by whichever thread has them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from eagleray.core.messages import PROTOCOL_VERSION, Abort, Hello, Submit, ToIngress, ToWorker
from eagleray.workers.frames import ChannelError, FrameReader, encode_frame
from eagleray.workers.outbox import Outbox

START_DEADLINE_S: Final = 10.0
# An ingress that reads nothing while this much has piled up is gone for our purposes: it is cut off.
MAX_UNSENT_BYTES: Final = 256 * 2**20
# Far more than the interval of an ingress's pings: one that says nothing for so long is stopped, or its host is gone.
INGRESS_SILENCE_DEADLINE_S: Final = 10.0
HEARTBEAT_INTERVAL_S: Final = 0.5

logger = logging.getLogger("eagleray")


class ChannelEvents(Protocol):
    """What the channel tells its worker, on the channel's thread."""

    def greeting(self) -> Iterable[ToIngress]:
        """What a new connection hears first; the first of it is a ``Welcome``."""
        ...

    def heartbeat(self) -> ToIngress | None:
        """Asked for at each interval, whatever other threads do: what every connection should hear now."""
        ...

    def submitted(self, connection: int, submit: Submit) -> None: ...

    def aborted(self, connection: int, request_id: str) -> None: ...

    def disconnected(self, connection: int) -> None: ...


class Channel:
    """Listens on ``host`` (port 0: any free one); ``send`` may be called from any thread."""

    def __init__(
        self, events: ChannelEvents, host: str, port: int = 0, silence_deadline_s: float = INGRESS_SILENCE_DEADLINE_S
    ) -> None:
        self._events = events
        self._silence_deadline_s = silence_deadline_s
        self._host, self._port = host, port
        self._outboxes: dict[int, Outbox] = {}
        self._transports: dict[int, asyncio.WriteTransport] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # a loop holds its tasks weakly
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._stopping = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="channel", daemon=True)

    @property
    def address(self) -> str:
        return f"{self._host}:{self._port}"

    def start(self) -> None:
        self._thread.start()
        self._call(self._listen)

    def stop(self, last_words: ToIngress | None = None) -> None:
        """Close the listener, then every connection, which hears ``last_words`` before. May be called from several
        threads, and again."""
        with self._stopping:
            if self._thread.is_alive():
                self._call(lambda: self._close(last_words))
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(START_DEADLINE_S)
                self._loop.close()

    def send(self, messages: dict[int, ToIngress]) -> None:
        """One message per connection; connections that are gone are skipped. One that cannot take its message is cut
        off; the others get theirs."""
        for connection, message in messages.items():
            outbox = self._outboxes.get(connection)
            if outbox is not None:
                try:
                    outbox.send(encode_frame(message))
                except ChannelError as error:
                    logger.warning("a connection of an ingress is cut off: %s", error)
                    self._cut_off(connection)

    def broadcast(self, message: ToIngress) -> None:
        """One message for every connection."""
        self.send(dict.fromkeys(list(self._outboxes), message))

    def _cut_off(self, connection: int) -> None:
        transport = self._transports.get(connection)
        if transport is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and every connection with it
                self._loop.call_soon_threadsafe(transport.abort)

    # ---- on the channel's thread

    def _call(self, function: Callable[[], object]) -> None:
        asyncio.run_coroutine_threadsafe(function(), self._loop).result(START_DEADLINE_S)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, self._host, self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self._tasks.add(asyncio.create_task(self._beat()))

    async def _close(self, last_words: ToIngress | None) -> None:
        if self._server is not None:
            self._server.close()
        if last_words is not None:
            self.broadcast(last_words)
        # Again until there are none: a connection that was being accepted begins to be served meanwhile.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            message = self._events.heartbeat()
            if message is not None:
                self.broadcast(message)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            writer.close()  # here, because a task that is cancelled before it begins closes nothing

        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(ended)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = next(self._numbers)
        frames = FrameReader(reader, ToWorker)
        try:
            hello = await self._next(frames)
            if not isinstance(hello, Hello):
                return
            outbox = Outbox(writer.transport, self._loop, MAX_UNSENT_BYTES)
            with outbox.first():
                self._outboxes[connection], self._transports[connection] = outbox, writer.transport
                for message in self._events.greeting():
                    outbox.send(encode_frame(message))
            if hello.protocol != PROTOCOL_VERSION:
                return  # the welcome tells the other side which version it has met
            while (heard := await self._next(frames)) is not None:
                if isinstance(heard, Submit):
                    self._events.submitted(connection, heard)
                elif isinstance(heard, Abort):
                    self._events.aborted(connection, heard.request_id)
        except TimeoutError:
            writer.transport.abort()  # nobody would read what is still to be sent
        except (ChannelError, asyncio.CancelledError):
            pass  # either way the connection ends here, and its requests with it
        finally:
            ended = self._outboxes.pop(connection, None)
            if ended is not None:
                del self._transports[connection]
                ended.close()
                self._events.disconnected(connection)

    async def _next(self, frames: FrameReader) -> ToWorker | None:
        async with asyncio.timeout(self._silence_deadline_s):
            message: ToWorker | None = await frames.next()
            return message
