"""The end that wants the blocks: pulls them into blocks that it has reserved, and says when all is quiet again.

Thread-safe. A pull that waits for its source costs no thread; ``num_threads`` pulls copy at the same time, and one
whose source has stopped gives its thread back after ``stall_deadline_s``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from eagleray.core.clock import Clock
from eagleray.core.config import TransferConfig
from eagleray.core.errors import TransferError
from eagleray.core.kv_layout import KVLayout
from eagleray.core.kv_region import KVRegion
from eagleray.kv_transfer.pull import Pull, PullOrder, PullResult, ReceiverState
from eagleray.kv_transfer.reactor import Reactor
from eagleray.kv_transfer.transport import BlockStore, Transport


class KVReceiver:
    """Pulls into one pool, from construction to ``stop``. ``transports`` in order of preference."""

    def __init__(
        self,
        layout: KVLayout,
        blocks: BlockStore,
        clock: Clock,
        config: TransferConfig,
        transports: Sequence[Transport],
    ) -> None:
        self._state = ReceiverState(layout, layout.digest(), blocks, clock, config, tuple(transports), self._forget)
        self._pulls: dict[str, Pull] = {}
        self._lock = threading.Lock()  # around pulls and is_stopped
        self._is_stopped = False
        self._reactor = Reactor("kv-receiver", config.num_threads, on_tick=lambda: False)

    def pull(
        self,
        request_id: str,
        source: KVRegion,
        first_block: int,
        block_ids: Sequence[int],
        on_done: Callable[[PullResult], None],
    ) -> None:
        """Fetch the blocks of a request from block number ``first_block`` on; ``block_ids[i]`` of the own pool takes
        block ``first_block + i``.

        ``on_done`` is called exactly once, on a thread of the receiver, when nothing writes into the blocks any more.
        Raises ``ValueError`` for a request that is being pulled already, ``TransferError`` after ``stop``.
        """
        pull = Pull(self._state, PullOrder(request_id, source, first_block, tuple(block_ids), on_done))
        with self._lock:
            if self._is_stopped:
                raise TransferError(f"request {request_id}: the receiver is stopped")
            if request_id in self._pulls:
                raise ValueError(f"request_id={request_id!r} is being pulled already; every attempt needs its own id")
            self._pulls[request_id] = pull
            self._reactor.add(pull)

    def cancel(self, request_id: str) -> None:
        """Stop within a piece; ``on_done`` tells when it is quiet. No effect on a pull that has ended."""
        with self._lock:
            pull = self._pulls.get(request_id)
        if pull is not None:
            pull.cancel()
            self._reactor.poke(pull)

    def stop(self) -> None:
        """Cancel everything; every ``on_done`` has been called when this returns. Not from ``on_done``."""
        with self._lock:
            self._is_stopped = True
            pulls = list(self._pulls.values())
        for pull in pulls:
            pull.cancel()
        self._reactor.stop()
        for transport in self._state.transports:
            transport.close()

    def _forget(self, request_id: str) -> None:
        with self._lock:
            del self._pulls[request_id]
