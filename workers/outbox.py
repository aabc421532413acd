"""The sending half of a connection, for any thread: bytes go straight to the kernel, and wait for the loop only when
it takes no more.

A token that first had to wake the channel's thread would wait there for the interpreter's lock, while the step thread
already prepares the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator

from eagleray.workers.frames import ChannelError


class Outbox:
    """Sends over a connection that ``transport`` reads. ``close`` it before or after the transport, on its loop."""

    def __init__(
        self, transport: asyncio.BaseTransport, loop: asyncio.AbstractEventLoop, max_unsent_bytes: int
    ) -> None:
        # A descriptor of our own: the transport's is the loop's, and may be closed and given to another connection.
        self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._socket.setblocking(False)
        self._loop = loop
        self._max_unsent_bytes = max_unsent_bytes
        self._lock = threading.RLock()  # around the two below and the socket's end
        self._unsent = bytearray()
        self._is_closed = False

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """What this thread sends inside goes before whatever others send meanwhile."""
        with self._lock:
            yield

    def send(self, data: bytes) -> None:
        """Never waits. Raises ``ChannelError`` when too much is unsent already; a broken connection takes it silently:
        whoever reads from it notices."""
        with self._lock:
            if self._is_closed:
                return
            if len(self._unsent) > self._max_unsent_bytes:
                raise ChannelError(f"it has not read {self._max_unsent_bytes} bytes")
            if self._unsent:
                self._unsent += data
                return
            num_sent = self._send_now(data)
            if num_sent < len(data):
                self._unsent += data[num_sent:]
                with contextlib.suppress(RuntimeError):  # the loop is closed, and every connection with it
                    self._loop.call_soon_threadsafe(self._watch)

    def close(self) -> None:
        """On the loop's thread. What the kernel has is still delivered."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.remove_writer(self._socket.fileno())
                self._socket.close()

    def _send_now(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:  # reset or closed: nothing more gets there
            return len(data)

    # ---- on the loop's thread

    def _watch(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._loop.add_writer(self._socket.fileno(), self._flush)

    def _flush(self) -> None:
        with self._lock:
            del self._unsent[: self._send_now(self._unsent)]
            if not self._unsent:
                self._loop.remove_writer(self._socket.fileno())
