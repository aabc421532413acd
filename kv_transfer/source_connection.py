"""One reader's connection at the source: its subscription, its announcements, and its bytes when it reads over TCP."""

from __future__ import annotations

import contextlib
import selectors
import threading
from dataclasses import dataclass, field
from typing import Final

from eagleray.core.clock import Clock
from eagleray.core.config import TransferConfig
from eagleray.core.errors import TransferError
from eagleray.kv_transfer.fingerprint import BlockOps
from eagleray.kv_transfer.link import Link
from eagleray.kv_transfer.plan import QUICK_BYTES, blocks_per_piece
from eagleray.kv_transfer.reactor import Next
from eagleray.kv_transfer.session import LeaseState, SourceLease, SourceLedger
from eagleray.kv_transfer.transport import BlockStore
from eagleray.kv_transfer.wire import (
    Announcement,
    BlockBytes,
    Frame,
    Heartbeat,
    ReadBlocks,
    Received,
    Release,
    Subscribe,
)

_HEARTBEATS_PER_DEADLINE: Final = 4  # one that comes late must not look like a dead source


@dataclass(frozen=True, slots=True)
class SourceState:
    """What a source and the connections of its readers share."""

    ledger: SourceLedger
    blocks: BlockStore
    clock: Clock
    config: TransferConfig
    layout_digest: str
    block_bytes: int
    ops: BlockOps
    readers: dict[str, ReaderConnection] = field(default_factory=dict)  # by request id
    lock: threading.Lock = field(default_factory=threading.Lock)  # around the ledger, its leases, and readers
    stopping: threading.Event = field(default_factory=threading.Event)


class ReaderConnection:
    """A ``Handler``: it never waits for the reader. What the socket does not take stays queued in the link."""

    def __init__(self, source: SourceState, link: Link) -> None:
        self._source = source
        self._link = link
        self._lease: SourceLease | None = None
        self._accepted_s = source.clock.now_s()
        self._is_lost = False
        self._last_words = ""

    def interest(self) -> tuple[int, int]:
        # What it sends meanwhile is read when its own bytes have left.
        return self._link.fileno(), selectors.EVENT_WRITE if self._link.wants_write else selectors.EVENT_READ

    def serve(self, *, may_take_long: bool) -> Next:
        """Frames first, so that a release or a read does not wait behind fingerprints."""
        try:
            while may_take_long or self._link.num_unsent_bytes <= QUICK_BYTES:
                if not self._link.flush():
                    return Next.WAIT  # the reader is slow; go on when its socket takes more
                if self._lease is not None and self._lease.has_ended:
                    return Next.END
                frame = self._link.poll_frame()
                if isinstance(frame, Release):
                    return Next.END
                if frame is not None:
                    self._handle(frame)
                elif (following := self._announce_next(may_take_long)) is not None:
                    return following
        except TransferError as error:
            self._last_words = str(error)
            return Next.END
        return Next.WORK

    def tick(self) -> None:
        """A sign of life, so that a reader can tell a busy source from a dead one."""
        interval_s = self._source.config.stall_deadline_s / _HEARTBEATS_PER_DEADLINE
        is_due = self._source.clock.now_s() - self._link.last_sent_s >= interval_s
        if is_due and self._lease is not None and not self._link.wants_write:
            try:
                self._link.queue(Heartbeat())
                self._link.flush()
            except TransferError:
                self._is_lost = True

    def is_over(self) -> bool:
        if self._is_lost or self._source.stopping.is_set():
            return True
        if self._lease is None:
            silent_s = self._source.clock.now_s() - self._accepted_s
            return silent_s > self._source.config.stall_deadline_s
        if self._lease.state is LeaseState.ENDING and self._link.wants_write:
            return self._source.clock.now_s() >= self._lease.deadline_s
        return self._lease.has_ended

    def finish(self) -> None:
        """Say why, if that can be said without waiting; close; and only then let the lease go."""
        words = (self._lease.error if self._lease is not None else "") or self._last_words
        if words and not self._link.wants_write:
            request_id = self._lease.request_id if self._lease is not None else ""
            with contextlib.suppress(TransferError):  # it has gone: nobody to tell
                self._link.queue(Announcement(request_id, error=words))
                self._link.flush()
        self._link.close()
        if self._lease is not None:
            with self._source.lock:
                if self._source.readers.get(self._lease.request_id) is self:  # else a later one of the same id
                    del self._source.readers[self._lease.request_id]
                self._source.ledger.leave(self._lease, self._source.clock.now_s())

    def _handle(self, frame: Frame) -> None:
        now_s = self._source.clock.now_s()
        if isinstance(frame, Subscribe) and self._lease is None:
            with self._source.lock:
                self._lease = self._source.ledger.subscribe(frame, now_s)
                self._source.readers[frame.request_id] = self
        elif isinstance(frame, Received) and self._lease is not None:
            with self._source.lock:
                self._source.ledger.touch(self._lease, now_s)
        elif isinstance(frame, ReadBlocks) and self._lease is not None:
            with self._source.lock:
                self._source.ledger.read(self._lease, frame.slots, now_s)
            views = [view for slot in frame.slots for view in self._source.blocks.block_views(slot)]
            self._link.queue(BlockBytes(sum(view.nbytes for view in views)), views)
        else:
            raise TransferError(f"a {type(frame).__name__} frame is out of place here; subscribe first, and once")

    def _announce_next(self, may_take_long: bool) -> Next | None:
        """Take the fingerprints of some blocks that are ready, and announce them. What to do instead when there are
        none, or too many of them."""
        if self._lease is None:
            return Next.WAIT
        max_blocks = blocks_per_piece(self._source.config.piece_bytes, self._source.block_bytes)
        with self._source.lock:
            num_bytes = self._source.ledger.num_ready_blocks(self._lease) * self._source.block_bytes
            if num_bytes > QUICK_BYTES and not may_take_long:
                return Next.WORK
            piece = self._source.ledger.next_piece(self._lease, max_blocks)
        if piece is None:
            return Next.WAIT
        digest, blocks, ops = self._source.layout_digest, self._source.blocks, self._source.ops
        fingerprints = [ops.fingerprint(digest, blocks.block_views(slot)) for slot in piece.slots]
        self._link.queue(piece.announcement(self._lease.request_id, fingerprints))
        return None
