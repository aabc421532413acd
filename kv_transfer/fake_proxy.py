"""A network between readers and a source that cuts, delays, repeats and corrupts: for tests of whatever uses links."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final

from eagleray.kv_transfer.wire import HEADER_BYTES, Announcement, BlockBytes, decode_body, decode_length

_CHUNK_BYTES: Final = 65536
_CONNECT_DEADLINE_S: Final = 10.0


class FaultyProxy:
    """A context manager that forwards TCP connections to ``address`` (host:port of a source). Set faults at any time.

    They act on what the source says, frame by frame; what a reader says passes as it is.
    """

    def __init__(self, address: str) -> None:
        self.flowing = threading.Event()  # cleared: nothing more arrives until it is set again
        self.flowing.set()
        self.held = threading.Event()  # something waits for ``flowing``
        self.cut_after_bytes: int | None = None  # of each connection; then both its ends are closed
        self.chunk_bytes = _CHUNK_BYTES  # bytes arrive in pieces of at most this size
        self.repeats_announcements = False  # each twice, and after it all earlier ones again
        self.corrupt: Callable[[bytearray], None] = lambda raw: None  # gets the bytes of blocks, and may change them
        self._source = address.rpartition(":")[::2]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def cut(self) -> None:
        """Close all connections, as they are."""
        for sock in self._sockets[1:]:
            _hang_up(sock)

    def close(self) -> None:
        """May be repeated."""
        for sock in self._sockets:
            _hang_up(sock)
        self.flowing.set()
        for thread in list(self._threads):
            thread.join(_CONNECT_DEADLINE_S)
        for sock in self._sockets:
            sock.close()

    # ---- threads

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="faulty-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        host, port = self._source
        with contextlib.suppress(OSError):  # closed
            while True:
                reader, _ = self._listener.accept()
                source = socket.create_connection((host, int(port)), _CONNECT_DEADLINE_S)
                source.settimeout(None)
                self._sockets += [reader, source]
                self._spawn(self._to_source, reader, source)
                self._spawn(self._to_reader, source, reader)

    def _to_source(self, reader: socket.socket, source: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := reader.recv(_CHUNK_BYTES):
                source.sendall(data)
        _hang_up(reader, source)

    def _to_reader(self, source: socket.socket, reader: socket.socket) -> None:
        num_sent = 0
        with contextlib.suppress(OSError, EOFError):
            for data in self._said_by(source):
                for start in range(0, len(data), self.chunk_bytes):
                    piece = data[start : start + self.chunk_bytes]
                    if not self.flowing.is_set():
                        self.held.set()
                        self.flowing.wait()
                    left = len(piece) if self.cut_after_bytes is None else self.cut_after_bytes - num_sent
                    reader.sendall(piece[: max(0, left)])
                    num_sent += len(piece)
                    if left <= len(piece) and self.cut_after_bytes is not None:
                        raise EOFError
        _hang_up(reader, source)

    def _said_by(self, source: socket.socket) -> Iterator[bytes]:
        """Frames, and the raw bytes of blocks after those that announce them."""
        earlier: list[bytes] = []
        while True:
            header = _receive(source, HEADER_BYTES)
            body = _receive(source, decode_length(header))
            frame, whole = decode_body(body), bytes(header + body)
            yield whole
            if isinstance(frame, Announcement) and self.repeats_announcements:
                yield whole
                yield from earlier
                earlier.append(whole)
            if isinstance(frame, BlockBytes):
                raw = _receive(source, frame.num_bytes)
                self.corrupt(raw)
                yield bytes(raw)


def _receive(sock: socket.socket, num_bytes: int) -> bytearray:
    """Exactly so many bytes. Raises ``EOFError`` when the connection ends before."""
    received = bytearray()
    while len(received) < num_bytes:
        data = sock.recv(min(_CHUNK_BYTES, num_bytes - len(received)))
        if not data:
            raise EOFError
        received += data
    return received


def _hang_up(*sockets: socket.socket) -> None:
    for sock in sockets:
        with contextlib.suppress(OSError):  # it is not connected any more
            sock.shutdown(socket.SHUT_RDWR)
