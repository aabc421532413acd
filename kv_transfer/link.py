"""One TCP connection between a reader and a source: frames and raw bytes, and no wait without a deadline.

The socket never blocks. ``poll_frame``, ``queue`` and ``flush`` do what can be done now; ``wait_frame``, ``send`` and
``receive_into`` wait, at most ``stall_deadline_s`` without a byte of progress, and never beyond ``limit``.
A link is used by one thread at a time; only ``limit`` may be called from another one.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import select
import socket
from collections import deque
from collections.abc import Sequence
from typing import Final

from eagleray.core.clock import Clock
from eagleray.core.errors import TransferError
from eagleray.kv_transfer.wire import HEADER_BYTES, Frame, decode_body, decode_length, encode_frame

# A wait looks at the clock and at its limit at least so often: the limit may be moved by another thread, and a clock
# that was passed in may move at its own pace.
_RECHECK_S: Final = 0.05
_MAX_VIEWS_PER_SEND: Final = 64  # well below the system's IOV_MAX


class Link:
    """Owns ``sock`` from here on."""

    def __init__(self, sock: socket.socket, clock: Clock, stall_deadline_s: float, peer: str) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # not a TCP socket: nothing to switch off
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer  # as named in errors
        self._socket = sock
        self._clock = clock
        self._stall_deadline_s = stall_deadline_s
        self._limit_s = math.inf
        self._out: deque[memoryview] = deque()
        self._num_unsent_bytes = 0
        self._inbox: deque[Frame] = deque()  # came while something else was waited for
        self._buffer = bytearray(HEADER_BYTES)  # the part of a frame that is being received: header or body
        self._filled = 0
        self._in_body = False
        self.last_received_s = self.last_sent_s = clock.now_s()

    @classmethod
    def connect(cls, address: str, clock: Clock, stall_deadline_s: float, peer: str) -> Link:
        """Begin to connect to ``address`` (host:port); the first wait on the link waits for it to be established."""
        host, _, port = address.rpartition(":")
        try:
            family, kind, protocol, _, sockaddr = socket.getaddrinfo(
                host.strip("[]"), int(port), type=socket.SOCK_STREAM
            )[0]
        except (OSError, ValueError) as error:
            raise TransferError(f"{peer}: address {address!r} is not a host:port that is known here: {error}") from None
        link = cls(socket.socket(family, kind, protocol), clock, stall_deadline_s, peer)
        link._socket.connect_ex(sockaddr)  # a failure shows at the first use
        return link

    @staticmethod
    def is_found_at_once(address: str) -> bool:
        """Whether ``address`` has a number and no name, which a resolver might take long for."""
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(address.rpartition(":")[0].strip("[]")))
        return False

    def fileno(self) -> int:
        return self._socket.fileno()

    def limit(self, until_s: float) -> None:
        """No wait goes on beyond ``until_s`` (of this link's clock). Thread-safe."""
        self._limit_s = min(self._limit_s, until_s)

    def close(self) -> None:
        """May be repeated. Bytes that are queued and not sent are dropped."""
        self._out.clear()
        self._num_unsent_bytes = 0
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    # ---- sending

    @property
    def wants_write(self) -> bool:
        return bool(self._out)

    @property
    def num_unsent_bytes(self) -> int:
        """Of what is queued."""
        return self._num_unsent_bytes

    def queue(self, frame: Frame, views: Sequence[memoryview] = ()) -> None:
        """Append a frame and the raw bytes that follow it. Views are sent from where they lie, when they are sent."""
        added = [memoryview(encode_frame(frame)), *(view for view in views if view.nbytes)]
        self._out.extend(added)
        self._num_unsent_bytes += sum(view.nbytes for view in added)

    def flush(self) -> bool:
        """Send what the socket takes now; True when nothing is left."""
        while self._out:
            views = [self._out[n] for n in range(min(len(self._out), _MAX_VIEWS_PER_SEND))]
            now_s = self._clock.now_s()
            try:
                sent = self._socket.sendmsg(views)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                raise self._lost(error) from None
            self.last_sent_s = now_s
            self._drop_sent(sent)
        return True

    def send(self, frame: Frame) -> None:
        """Queue a frame and wait until everything queued is sent."""
        self.queue(frame)
        start_s = self._clock.now_s()
        while not self.flush():
            self._wait(select.POLLOUT, max(start_s, self.last_sent_s))

    def _drop_sent(self, num_bytes: int) -> None:
        self._num_unsent_bytes -= num_bytes
        while num_bytes:
            head = self._out.popleft()
            if head.nbytes > num_bytes:
                self._out.appendleft(head[num_bytes:])
                return
            num_bytes -= head.nbytes

    # ---- receiving

    def poll_frame(self) -> Frame | None:
        """The next frame if it is here as a whole. Raises ``TransferError`` on garbage or a closed connection."""
        return self._inbox.popleft() if self._inbox else self._assemble_frame()

    def wait_for(self, kind: type[Frame]) -> Frame:
        """The next frame of ``kind``; others that come before it are kept for ``poll_frame``."""
        start_s = self._clock.now_s()
        while True:
            frame = self._assemble_frame()
            if frame is None:
                self._wait(select.POLLIN, max(start_s, self.last_received_s))
            elif isinstance(frame, kind):
                return frame
            else:
                self._inbox.append(frame)

    def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fill ``views`` with the next raw bytes."""
        start_s = self._clock.now_s()
        for view in views:
            filled = 0
            while filled < view.nbytes:
                received = self._receive(view[filled:])
                if not received:
                    self._wait(select.POLLIN, max(start_s, self.last_received_s))
                filled += received

    def _assemble_frame(self) -> Frame | None:
        while True:
            received = self._receive(memoryview(self._buffer)[self._filled :])
            if not received:
                return None
            self._filled += received
            if self._filled < len(self._buffer):
                continue
            whole, self._filled, self._in_body = self._buffer, 0, not self._in_body
            self._buffer = bytearray(decode_length(whole) if self._in_body else HEADER_BYTES)
            if not self._in_body:
                return decode_body(whole)

    def _receive(self, view: memoryview) -> int:
        """Bytes received now, 0 when there are none yet."""
        try:
            received = self._socket.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise self._lost(error) from None
        if not received:
            raise TransferError(f"{self.peer} closed the connection")
        self.last_received_s = self._clock.now_s()
        return received

    def _wait(self, events: int, progress_s: float) -> None:
        """Wait for an event of the socket; ``progress_s`` is when the last byte moved."""
        poller = select.poll()
        poller.register(self._socket, events)
        stall_s = progress_s + self._stall_deadline_s
        while True:
            now_s = self._clock.now_s()
            if now_s >= self._limit_s:
                raise TransferError(f"{self.peer}: the transfer was stopped here")
            if now_s >= stall_s:
                raise TransferError(f"{self.peer}: no progress for stall_deadline_s={self._stall_deadline_s:g}")
            timeout_s = min(_RECHECK_S, stall_s - now_s, self._limit_s - now_s)
            if poller.poll(math.ceil(timeout_s * 1000)):
                return

    def _lost(self, error: OSError) -> TransferError:
        return TransferError(f"{self.peer}: connection lost: {error.strerror or error}")
