"""Who may read what until when: the state machines of both ends of a hand-over, without sockets, threads or a clock.

Source: a *lease* per request. Reader: a *pull*. Whoever drives them passes the time in and does the effects.

    AWAITED ---- open ----> READING        a reader came before the request did
    OPEN ------ subscribe -> READING       no reader yet
    OPEN ------ close, expire -----------> RELEASED
    READING --- close, expire -> ENDING    its reader is told and cut off
    READING, ENDING --- leave -----------> RELEASED   the reader's connection is closed: nothing reads any more

A lease that was opened reports its release exactly once. Neither cancelling nor expiry makes blocks free by itself:
only RELEASED does, when no thread of the source touches them and the reader has gone or lost the right to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from eagleray.core.errors import TransferError
from eagleray.kv_transfer.plan import blocks_to_announce, num_blocks_for
from eagleray.kv_transfer.wire import Announcement, BlockNotice, Subscribe

# How long a lease that was ended still waits for its reader to take the bytes that are under way and the reason.
LAST_WORDS_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class SourceProgress:
    """How far the source has computed a request. ``block_ids`` is the whole block table so far."""

    block_ids: tuple[int, ...]
    num_tokens: int  # computed: their KV lies in the blocks
    is_last: bool = False  # nothing more will be computed here
    token_ids: tuple[int, ...] = ()  # with is_last: sampled here, not yet computed


class LeaseState(Enum):
    AWAITED = "awaited"
    OPEN = "open"
    READING = "reading"
    ENDING = "ending"
    RELEASED = "released"


class SourceLease:
    """One request at the source. Changed by ``SourceLedger`` only; readable by whoever holds the ledger's lock."""

    __slots__ = ("deadline_s", "error", "next_block", "progress", "request_id", "slots", "state", "told_last")

    def __init__(self, request_id: str, state: LeaseState) -> None:
        self.request_id = request_id
        self.state = state
        self.error = ""  # why it ended, for its reader
        self.progress = SourceProgress((), 0)
        self.next_block = 0  # the first one not announced yet
        self.slots: set[int] = set()  # announced: may be read
        self.told_last = False
        self.deadline_s = math.inf  # when it ends without progress; in ENDING: when its reader is cut off untold

    @property
    def is_reading(self) -> bool:
        return self.state is LeaseState.READING

    @property
    def has_ended(self) -> bool:
        return self.state in (LeaseState.ENDING, LeaseState.RELEASED)


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks to be announced next: their first index, and their block ids at the source."""

    first_index: int
    slots: tuple[int, ...]
    progress: SourceProgress
    is_last: bool

    def announcement(self, request_id: str, fingerprints: Sequence[bytes]) -> Announcement:
        notices = (
            BlockNotice(self.first_index + n, slot, digest)
            for n, (slot, digest) in enumerate(zip(self.slots, fingerprints, strict=True))
        )
        token_ids = self.progress.token_ids if self.is_last else ()
        return Announcement(request_id, tuple(notices), self.progress.num_tokens, self.is_last, token_ids)


class SourceLedger:
    """All leases of one source. Not thread-safe.

    A lease gets a deadline, ``lease_s`` after the last progress of its reader, once nothing more is computed for it;
    until then the engine holds the blocks anyway. A subscription to a request that is not known waits as long. An
    ended lease is remembered as long, so that a late reader is refused in words instead of waiting.
    """

    def __init__(self, epoch: int, layout_digest: str, block_size_tokens: int, lease_s: float) -> None:
        self._epoch = epoch
        self._layout_digest = layout_digest
        self._block_size_tokens = block_size_tokens
        self._lease_s = lease_s
        self._leases: dict[str, SourceLease] = {}
        self._released: list[str] = []

    # ---- the worker's side

    def open(self, request_id: str) -> None:
        """The request has been accepted here. Raises ``ValueError`` when it was opened before."""
        lease = self._leases.get(request_id)
        if lease is None:
            self._leases[request_id] = SourceLease(request_id, LeaseState.OPEN)
        elif lease.state is LeaseState.AWAITED:
            lease.state, lease.deadline_s = LeaseState.READING, math.inf
        else:
            raise ValueError(f"request_id={request_id!r} was opened before; every attempt needs its own id")

    def announce(self, request_id: str, progress: SourceProgress, now_s: float) -> None:
        """No effect on a request that has ended."""
        lease = self._leases.get(request_id)
        if lease is not None and lease.state in (LeaseState.OPEN, LeaseState.READING):
            lease.progress = progress
            if progress.is_last:
                lease.deadline_s = now_s + self._lease_s

    def close(self, request_id: str, error: str, now_s: float) -> None:
        """The request ended here; ``error`` says why to its reader. No effect on one that has ended or is unknown."""
        lease = self._leases.get(request_id)
        if lease is not None:
            self._end(lease, error, now_s)

    def close_all(self, error: str, now_s: float) -> None:
        for lease in list(self._leases.values()):
            self._end(lease, error, now_s)

    def expire(self, now_s: float) -> None:
        """End what has passed its deadline, and forget what ended long ago."""
        for lease in [lease for lease in self._leases.values() if lease.deadline_s <= now_s]:
            if lease.state is LeaseState.RELEASED:
                del self._leases[lease.request_id]
            elif lease.state is LeaseState.AWAITED:
                self._end(lease, f"the request was not opened within lease_s={self._lease_s:g}", now_s)
            else:
                self._end(lease, f"the reader made no progress for lease_s={self._lease_s:g}", now_s)

    @property
    def has_leases(self) -> bool:
        """Ended ones that are remembered count."""
        return bool(self._leases)

    def take_released(self) -> list[str]:
        """Requests released since the last call: each opened request appears once, ever."""
        released, self._released = self._released, []
        return released

    # ---- the reader's side

    def subscribe(self, subscription: Subscribe, now_s: float) -> SourceLease:
        """A reader came. Raises ``TransferError`` saying why it is refused."""
        self._check_ticket(subscription)
        lease = self._leases.get(subscription.request_id)
        if lease is None:
            lease = self._leases[subscription.request_id] = SourceLease(subscription.request_id, LeaseState.AWAITED)
            lease.deadline_s = now_s + self._lease_s
        elif lease.state is LeaseState.OPEN:
            lease.state = LeaseState.READING
            self.touch(lease, now_s)
        else:
            raise TransferError(lease.error or "the request has a reader already; a pull is one connection")
        lease.next_block = subscription.first_block
        return lease

    def num_ready_blocks(self, lease: SourceLease) -> int:
        """How many are to be announced now."""
        return len(self._ready(lease)) if lease.is_reading else 0

    def next_piece(self, lease: SourceLease, max_blocks: int) -> Piece | None:
        """What is to be announced now, if anything; counts as announced from here on."""
        if not lease.is_reading or lease.told_last:
            return None
        progress, ready = lease.progress, self._ready(lease)
        chosen = ready[:max_blocks]
        is_last = progress.is_last and len(chosen) == len(ready)
        if not chosen and not is_last:
            return None
        slots = tuple(progress.block_ids[index] for index in chosen)
        lease.next_block, lease.told_last = chosen.stop, is_last
        lease.slots.update(slots)
        return Piece(chosen.start, slots, progress, is_last)

    def read(self, lease: SourceLease, slots: Sequence[int], now_s: float) -> None:
        """The reader asks for bytes. Raises ``TransferError`` unless it may have all of them."""
        if not lease.is_reading:
            raise TransferError(lease.error or "the request was not opened yet")
        if not lease.slots.issuperset(slots):
            raise TransferError(f"request {lease.request_id}: asked for blocks that are not announced to it")
        self.touch(lease, now_s)

    def touch(self, lease: SourceLease, now_s: float) -> None:
        """The reader made progress."""
        if lease.is_reading and lease.progress.is_last:
            lease.deadline_s = now_s + self._lease_s

    def leave(self, lease: SourceLease, now_s: float) -> None:
        """The reader's connection is closed and no thread of the source touches the blocks for it."""
        if lease.state is LeaseState.AWAITED:
            del self._leases[lease.request_id]
            lease.state = LeaseState.RELEASED
        elif lease.state is not LeaseState.RELEASED:
            self._release(lease, now_s)

    def _ready(self, lease: SourceLease) -> range:
        progress = lease.progress
        return blocks_to_announce(lease.next_block, progress.num_tokens, self._block_size_tokens, progress.is_last)

    def _check_ticket(self, subscription: Subscribe) -> None:
        if subscription.epoch != self._epoch:
            raise TransferError(
                f"epoch {subscription.epoch} of the ticket is not epoch {self._epoch} of this source: "
                "the worker was restarted and its blocks are gone"
            )
        if subscription.layout_digest != self._layout_digest:
            raise TransferError(
                f"layout {subscription.layout_digest} of the reader is not layout {self._layout_digest} of the source: "
                "give both pools the same model, dtype and block_size_tokens"
            )
        if subscription.first_block < 0:
            raise TransferError(f"first_block={subscription.first_block} is negative")

    def _end(self, lease: SourceLease, error: str, now_s: float) -> None:
        if lease.state is LeaseState.AWAITED:
            del self._leases[lease.request_id]
            lease.state, lease.error = LeaseState.RELEASED, error
        elif lease.state is LeaseState.READING:
            lease.state, lease.error, lease.deadline_s = LeaseState.ENDING, error, now_s + LAST_WORDS_S
        elif lease.state is LeaseState.OPEN:
            lease.error = error
            self._release(lease, now_s)

    def _release(self, lease: SourceLease, now_s: float) -> None:
        lease.state = LeaseState.RELEASED
        lease.error = lease.error or "the request was handed over before"
        lease.deadline_s = now_s + self._lease_s
        self._released.append(lease.request_id)


class PullSession:
    """What one reader knows of its blocks: announced, read and verified, in order of their index."""

    def __init__(self, request_id: str, first_block: int, num_reserved: int, block_size_tokens: int) -> None:
        self._request_id = request_id
        self._first_block = first_block
        self._num_reserved = num_reserved
        self._block_size_tokens = block_size_tokens
        self._notices: dict[int, BlockNotice] = {}  # announced and not verified yet, by index
        self._num_tokens = 0  # computed at the source
        self.num_verified = 0  # contiguous from first_block
        self.has_last = False
        self.token_ids: tuple[int, ...] = ()

    @property
    def next_index(self) -> int:
        """The block that is to be read next."""
        return self._first_block + self.num_verified

    @property
    def is_complete(self) -> bool:
        return self.has_last and self.next_index >= num_blocks_for(self._num_tokens, self._block_size_tokens)

    @property
    def num_tokens(self) -> int:
        """Computed tokens whose KV lies in blocks that the reader held before or has verified."""
        return self._num_tokens if self.is_complete else self.next_index * self._block_size_tokens

    def announced(self, announcement: Announcement) -> None:
        """Take in an announcement; repeated ones are harmless. Raises ``TransferError`` when it cannot go on."""
        if announcement.error:  # before the id, which a refusal may lack
            raise TransferError(announcement.error)
        if announcement.request_id != self._request_id:
            raise TransferError(f"announcement of request {announcement.request_id} on {self._request_id}'s connection")
        for notice in announcement.blocks:
            if not 0 <= notice.index - self._first_block < self._num_reserved:
                raise TransferError(
                    f"source announced block {notice.index}; reserved here are {self._num_reserved} from "
                    f"block {self._first_block} on"
                )
            if notice.index >= self.next_index:
                self._notices[notice.index] = notice
        self._num_tokens = max(self._num_tokens, announcement.num_tokens)
        if announcement.is_last:
            self._take_last(announcement)

    def _take_last(self, announcement: Announcement) -> None:
        num_blocks = num_blocks_for(self._num_tokens, self._block_size_tokens)
        missing = [index for index in range(self.next_index, num_blocks) if index not in self._notices]
        if missing:
            raise TransferError(f"source announced its last block, but never block {missing[0]}")
        self.has_last, self.token_ids = True, announcement.token_ids

    @property
    def has_next(self) -> bool:
        """A block is there to be read."""
        return self.next_index in self._notices

    def next_notices(self, max_blocks: int) -> list[BlockNotice]:
        """The next blocks to read: announced ones, without a gap."""
        notices: list[BlockNotice] = []
        while len(notices) < max_blocks and (notice := self._notices.get(self.next_index + len(notices))):
            notices.append(notice)
        return notices

    def verified(self, notice: BlockNotice) -> None:
        """The block at ``next_index`` is in and its fingerprint holds."""
        self._notices.pop(notice.index)
        self.num_verified += 1
