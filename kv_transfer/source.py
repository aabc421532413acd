"""The end that holds the blocks: tells each reader what is ready, and sends bytes to those that ask for them.

Thread-safe. The engine's thread only notes progress; fingerprints are taken and bytes are sent on the source's own
threads. A reader that is slow or stopped costs one connection and no thread.
"""

from __future__ import annotations

import contextlib
import functools
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Final

import msgspec

from eagleray.core.clock import Clock
from eagleray.core.config import TransferConfig
from eagleray.core.errors import ConfigError, TransferError
from eagleray.core.kv_region import KVRegion
from eagleray.kv_transfer.fingerprint import PORTABLE_BLOCK_OPS, BlockOps
from eagleray.kv_transfer.link import Link
from eagleray.kv_transfer.reactor import Next, Reactor, run_guarded
from eagleray.kv_transfer.session import SourceLedger, SourceProgress
from eagleray.kv_transfer.source_connection import ReaderConnection, SourceState
from eagleray.kv_transfer.transport import BlockStore

_BACKLOG: Final = 128


class KVSource:
    """Serves the blocks of one pool, from construction to ``stop``.

    ``region.address`` is the host and port to listen on; with port 0 a free one is chosen, see ``region``. Raises
    ``ConfigError`` when it cannot listen there.
    ``on_released(request_id)`` is called exactly once for each opened request, on a thread of the source, when no
    reader will read it any more: handed over, reader gone, deadline passed, or closed. Then its blocks may be freed.
    It must be quick: the same thread keeps the other readers alive.
    """

    def __init__(
        self,
        region: KVRegion,
        blocks: BlockStore,
        clock: Clock,
        config: TransferConfig,
        on_released: Callable[[str], None],
        ops: BlockOps = PORTABLE_BLOCK_OPS,
    ) -> None:
        digest, block_size_tokens = region.layout.digest(), region.layout.block_size_tokens
        ledger = SourceLedger(region.epoch, digest, block_size_tokens, config.lease_s)
        self._state = SourceState(ledger, blocks, clock, config, digest, region.layout.block_bytes, ops)
        self._on_released = on_released
        self._listener = _Listener(region.address, self._accept, self._state.stopping)
        self._region = msgspec.structs.replace(region, address=self._listener.address)
        self._reactor = Reactor("kv-source", config.num_threads, self._deliver)
        self._reactor.add(self._listener, needs_ticks=False)

    @property
    def region(self) -> KVRegion:
        """The pool as readers are told of it, with the address that is listened on."""
        return self._region

    def open(self, request_id: str) -> None:
        """The request has been accepted here.

        Raises ``ValueError`` when it was opened before, ``TransferError`` after ``stop``.
        """
        with self._state.lock:
            if self._state.stopping.is_set():
                raise TransferError(f"request {request_id}: the source is stopped")
            self._state.ledger.open(request_id)

    def announce(self, request_id: str, progress: SourceProgress) -> None:
        """The engine computed a chunk. Cheap; no effect on a request that has ended."""
        with self._state.lock:
            self._state.ledger.announce(request_id, progress, self._state.clock.now_s())
        self._poke_reader(request_id)

    def close(self, request_id: str, error: str) -> None:
        """The request was aborted, failed or finished here: its reader is told ``error`` and cut off."""
        with self._state.lock:
            self._state.ledger.close(request_id, error, self._state.clock.now_s())
        self._poke_reader(request_id)

    def expire(self) -> None:
        """Have leases that have passed their deadline ended now. The source's own thread does it regularly."""
        self._reactor.wake()

    def stop(self) -> None:
        """End everything: all leases are released, and reported, before this returns. Not from ``on_released``."""
        with self._state.lock:
            self._state.ledger.close_all("the source is stopping", self._state.clock.now_s())
            self._state.stopping.set()
        self._reactor.stop()
        self._deliver()

    def _accept(self, sock: socket.socket, peer: str) -> None:
        link = Link(sock, self._state.clock, self._state.config.stall_deadline_s, f"reader {peer}")
        self._reactor.add(ReaderConnection(self._state, link))

    def _poke_reader(self, request_id: str) -> None:
        reader = self._state.readers.get(request_id)
        if reader is None:
            self._reactor.wake()
        else:
            self._reactor.poke(reader)

    def _deliver(self) -> bool:
        """True while there is a lease, which may expire."""
        with self._state.lock:
            self._state.ledger.expire(self._state.clock.now_s())
            released, has_leases = self._state.ledger.take_released(), self._state.ledger.has_leases
        for request_id in released:
            run_guarded(functools.partial(self._on_released, request_id))
        return has_leases


class _Listener:
    """Handler of the listening socket."""

    def __init__(
        self, address: str, on_accept: Callable[[socket.socket, str], None], stopping: threading.Event
    ) -> None:
        host, _, port = address.rpartition(":")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host.strip("[]"), int(port)), family=family, backlog=_BACKLOG)
        except (OSError, ValueError) as error:
            raise ConfigError("region.address", address, f"cannot listen there: {error}; give host:port") from None
        self._socket.setblocking(False)
        self._on_accept = on_accept
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._stopping = stopping

    def interest(self) -> tuple[int, int]:
        return self._socket.fileno(), selectors.EVENT_READ

    def serve(self, *, may_take_long: bool) -> Next:
        with contextlib.suppress(OSError):  # none left, or gone before it was accepted
            while True:
                sock, peer = self._socket.accept()
                self._on_accept(sock, f"{peer[0]}:{peer[1]}")
        return Next.WAIT

    def tick(self) -> None:
        """Nothing is due: readers come when they come."""

    def is_over(self) -> bool:
        return self._stopping.is_set()

    def finish(self) -> None:
        self._socket.close()
