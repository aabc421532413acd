"""One pull at the reader: connect, subscribe, copy what is announced, verify it, and report once when it is quiet."""

from __future__ import annotations

import contextlib
import selectors
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from eagleray.core.clock import Clock
from eagleray.core.config import TransferConfig
from eagleray.core.errors import TransferError, TransportUnavailable
from eagleray.core.kv_layout import KVLayout
from eagleray.core.kv_region import KVRegion
from eagleray.kv_transfer.link import Link
from eagleray.kv_transfer.plan import blocks_per_piece
from eagleray.kv_transfer.reactor import Next
from eagleray.kv_transfer.session import PullSession
from eagleray.kv_transfer.transport import BlockReader, BlockStore, Transport
from eagleray.kv_transfer.wire import Announcement, Heartbeat, Received, Release, Subscribe

_REPORTS_PER_LEASE: Final = 8  # one that comes late must not cost the lease


@dataclass(frozen=True, slots=True)
class PullResult:
    """How a pull ended. The verified blocks may be used whether or not it is complete."""

    request_id: str
    num_verified_blocks: int  # contiguous from first_block
    num_tokens: int  # computed tokens in the blocks held before and the verified ones
    token_ids: tuple[int, ...]  # sampled at the source, to be appended to the known tokens; empty unless it said so
    complete: bool
    cancelled: bool
    reason: str  # why it is not complete: the source's own words where it gave some; empty when complete
    num_bytes: int
    copying_s: float  # spent in copying and verifying them: their ratio is the link's speed
    transfer_s: float  # from the last announcement to the end: what a user waits for; 0 when none came
    transport: str  # empty when no block was read
    skipped: tuple[str, ...]  # preferred transports that could not be used, with what is missing


@dataclass(frozen=True, slots=True)
class PullOrder:
    """What a worker asks for; see ``KVReceiver.pull``."""

    request_id: str
    source: KVRegion
    first_block: int
    block_ids: tuple[int, ...]
    on_done: Callable[[PullResult], None]


@dataclass(frozen=True, slots=True)
class ReceiverState:
    """What a receiver and its pulls share."""

    layout: KVLayout
    layout_digest: str
    blocks: BlockStore
    clock: Clock
    config: TransferConfig
    transports: tuple[Transport, ...]
    forget: Callable[[str], None]  # the pull has ended, and is about to be reported


class Pull:
    """A ``Handler``. Only ``cancel`` and ``is_over`` may be called from other threads than the one that serves it."""

    def __init__(self, receiver: ReceiverState, order: PullOrder) -> None:
        self._receiver = receiver
        self._order = order
        block_size_tokens = receiver.layout.block_size_tokens
        self._session = PullSession(order.request_id, order.first_block, len(order.block_ids), block_size_tokens)
        self._link: Link | None = None
        self._reader: BlockReader | None = None
        self._transport = ""
        self._skipped: list[str] = []
        self._is_cancelled = False
        self._reason = ""
        self._lost: TransferError | None = None  # the connection, while announced blocks are still being read
        self._last_announced_s: float | None = None
        self._idle_since_s = receiver.clock.now_s()
        self._copying_s = 0.0
        self._reported_s = receiver.clock.now_s()

    def cancel(self) -> None:
        """End a wait that is going on now, and allow no other one."""
        self._is_cancelled = True
        link = self._link
        if link is not None:
            link.limit(self._receiver.clock.now_s())

    # ---- Handler

    def interest(self) -> tuple[int, int]:
        if self._link is None:
            return -1, 0
        return self._link.fileno(), selectors.EVENT_READ | (selectors.EVENT_WRITE if self._link.wants_write else 0)

    def serve(self, *, may_take_long: bool) -> Next:
        """Copy all that is announced, looking for news between pieces."""
        if self._link is None and not (may_take_long or Link.is_found_at_once(self._order.source.address)):
            return Next.WORK
        try:
            link = self._link or self._connect()
            while not (self._session.is_complete or self._is_cancelled):
                if link.flush() and self._take_frame(link):
                    continue
                if self._session.has_next and not may_take_long:
                    return Next.WORK
                if not self._read_piece(link):
                    if self._lost is not None:
                        raise self._lost
                    self._idle_since_s = self._receiver.clock.now_s()
                    return Next.WAIT
        except (TransferError, OSError) as error:
            self._reason = self._last_words() or str(error)
        return Next.END

    def tick(self) -> None:
        """Give up on a source that has gone silent: a living one sends heartbeats."""
        if self._link is not None:
            stall_deadline_s = self._receiver.config.stall_deadline_s
            silent_s = self._receiver.clock.now_s() - max(self._link.last_received_s, self._idle_since_s)
            if silent_s >= stall_deadline_s:
                self._reason = f"{self._link.peer}: no sign of life for stall_deadline_s={stall_deadline_s:g}"

    def is_over(self) -> bool:
        return self._is_cancelled or bool(self._reason) or self._session.is_complete

    def finish(self) -> None:
        is_complete = self._session.is_complete
        if self._reader is not None:
            self._reader.close()
        if self._link is not None:
            if is_complete:
                with contextlib.suppress(TransferError):  # gone: then it has let go already
                    self._link.queue(Release())
                    self._link.flush()
            self._link.close()
        self._receiver.forget(self._order.request_id)
        self._order.on_done(self._result(is_complete))

    # ---- the steps

    def _connect(self) -> Link:
        source, order, receiver = self._order.source, self._order, self._receiver
        difference = receiver.layout.difference(source.layout)
        if difference is not None:
            raise TransferError(f"KV layouts differ: {difference}; give both pools the same model and engine settings")
        peer = f"source {source.worker_id} at {source.address}"
        link = self._link = Link.connect(source.address, receiver.clock, receiver.config.stall_deadline_s, peer)
        if self._is_cancelled:  # by a thread that did not see the link yet
            link.limit(receiver.clock.now_s())
        link.queue(Subscribe(order.request_id, source.epoch, receiver.layout_digest, order.first_block))
        return link

    def _take_frame(self, link: Link) -> bool:
        """Take in one frame if there is one. Blocks announced before a source died may still be in reach."""
        if self._lost is not None:
            return False
        try:
            frame = link.poll_frame()
        except TransferError as error:
            self._lost = error
            return False
        if isinstance(frame, Announcement):
            self._session.announced(frame)
            if frame.is_last and self._last_announced_s is None:
                self._last_announced_s = self._receiver.clock.now_s()
        elif not (frame is None or isinstance(frame, Heartbeat)):
            raise TransferError(f"{link.peer} sends a {type(frame).__name__} frame out of place")
        return frame is not None

    def _read_piece(self, link: Link) -> bool:
        """Copy and verify the next announced blocks; False when there are none."""
        receiver = self._receiver
        notices = self._session.next_notices(blocks_per_piece(receiver.config.piece_bytes, receiver.layout.block_bytes))
        if not notices:
            return False
        reader = self._reader or self._open_reader(link)
        start_s = receiver.clock.now_s()
        own_ids = [self._order.block_ids[notice.index - self._order.first_block] for notice in notices]
        into = [receiver.blocks.block_views(block_id) for block_id in own_ids]
        fingerprints = reader.read([notice.slot for notice in notices], into, lambda: self._is_cancelled)
        for notice, digest in zip(notices, fingerprints, strict=True):
            if digest != notice.fingerprint:
                raise TransferError(
                    f"block {notice.index} arrived with fingerprint {digest.hex()}, announced was "
                    f"{notice.fingerprint.hex()}: it was changed on the way or at its source"
                )
            self._session.verified(notice)
        self._copying_s += receiver.clock.now_s() - start_s
        self._report_progress(link)
        return True

    def _report_progress(self, link: Link) -> None:
        """Now and then, so that the lease goes on: each report wakes the source, which costs as much as some blocks."""
        now_s = self._receiver.clock.now_s()
        is_due = now_s - self._reported_s >= self._receiver.config.lease_s / _REPORTS_PER_LEASE
        if is_due and not (self._session.is_complete or self._lost):
            link.send(Received(self._session.num_verified))
            self._reported_s = now_s

    def _open_reader(self, link: Link) -> BlockReader:
        """With the first transport that connects these two workers."""
        for transport in self._receiver.transports:
            try:
                self._reader = transport.open(self._order.source, link)
            except TransportUnavailable as error:
                self._skipped.append(f"{transport.name}: {error}")
            else:
                self._transport = transport.name
                return self._reader
        raise TransferError("no transport connects the two workers: " + "; ".join(self._skipped))

    def _last_words(self) -> str:
        """Why the source ended the pull, if it said so: that explains more than the closed connection does."""
        with contextlib.suppress(TransferError):
            while self._link is not None and (frame := self._link.poll_frame()) is not None:
                if isinstance(frame, Announcement) and frame.error:
                    return frame.error
        return ""

    def _result(self, is_complete: bool) -> PullResult:
        ended_s = self._receiver.clock.now_s()
        failure = "cancelled" if self._is_cancelled else self._reason or "an unexpected error; the log has it"
        return PullResult(
            request_id=self._order.request_id,
            num_verified_blocks=self._session.num_verified,
            num_tokens=self._session.num_tokens,
            token_ids=self._session.token_ids,
            complete=is_complete,
            cancelled=self._is_cancelled and not is_complete,
            reason="" if is_complete else failure,
            num_bytes=self._session.num_verified * self._receiver.layout.block_bytes,
            copying_s=self._copying_s,
            transfer_s=0.0 if self._last_announced_s is None else ended_s - self._last_announced_s,
            transport=self._transport,
            skipped=tuple(self._skipped),
        )
