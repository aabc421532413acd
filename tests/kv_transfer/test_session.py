"""The state machines alone: every interleaving, no sockets and no threads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagleray.core.errors import TransferError
from eagleray.kv_transfer.session import LeaseState, PullSession, SourceLease, SourceLedger, SourceProgress
from eagleray.kv_transfer.wire import Announcement, BlockNotice, Subscribe

LEASE_S = 30.0


def make_ledger() -> SourceLedger:
    return SourceLedger(epoch=1, layout_digest="layout", block_size_tokens=4, lease_s=LEASE_S)


def ticket(request_id: str = "r", first_block: int = 0, epoch: int = 1, layout: str = "layout") -> Subscribe:
    return Subscribe(request_id, epoch, layout, first_block)


# ---- any interleaving

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["open", "announce", "last", "subscribe", "read", "touch", "close", "leave", "expire", "wait"]),
        st.sampled_from(["a", "b"]),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(STEPS)
def test_every_opened_request_is_released_exactly_once_whatever_happens(steps: list[tuple[str, str]]) -> None:
    ledger, now_s = make_ledger(), 0.0
    opened: list[str] = []
    released: list[str] = []
    reading: dict[str, list[SourceLease]] = {"a": [], "b": []}
    for step, request_id in steps:
        try:
            if step == "open":
                ledger.open(request_id)
                opened.append(request_id)
            elif step in ("announce", "last"):
                ledger.announce(request_id, SourceProgress((3, 5), 6, step == "last"), now_s)
            elif step == "subscribe":
                reading[request_id].append(ledger.subscribe(ticket(request_id), now_s))
            elif step == "close":
                ledger.close(request_id, "closed", now_s)
            elif step == "expire":
                ledger.expire(now_s)
            elif step == "wait":
                now_s += LEASE_S / 2
            elif reading[request_id]:
                lease = reading[request_id][-1]
                if step == "read":
                    ledger.next_piece(lease, max_blocks=1)
                    ledger.read(lease, sorted(lease.slots), now_s)
                elif step == "touch":
                    ledger.touch(lease, now_s)
                else:
                    ledger.leave(reading[request_id].pop(), now_s)
        except (TransferError, ValueError):
            pass  # refused: must change nothing
        just_released = ledger.take_released()
        released += just_released
        for lease in (lease for leases in reading.values() for lease in leases):
            may_read = lease.slots and lease.request_id in just_released
            assert not may_read, "released under a reader whose connection is still there"
    ledger.close_all("stop", now_s)
    for lease in (lease for leases in reading.values() for lease in leases):
        ledger.leave(lease, now_s)
    released += ledger.take_released()
    assert sorted(released) == sorted(opened)
    ledger.expire(now_s + LEASE_S)
    assert not ledger._leases, "an ended request is forgotten in the end"


# ---- leases


def test_a_reader_that_comes_first_waits_for_the_request() -> None:
    ledger = make_ledger()
    lease = ledger.subscribe(ticket(first_block=1), 0.0)
    assert ledger.next_piece(lease, 8) is None
    ledger.open("r")
    ledger.announce("r", SourceProgress((3, 5, 7), 9), 1.0)
    piece = ledger.next_piece(lease, 8)
    assert piece is not None
    assert (piece.first_index, piece.slots, piece.is_last) == (1, (5,), False)


def test_a_request_that_never_opens_is_given_up_without_a_release() -> None:
    ledger = make_ledger()
    lease = ledger.subscribe(ticket(), 0.0)
    ledger.expire(LEASE_S)
    assert (lease.state, lease.error) == (LeaseState.RELEASED, "the request was not opened within lease_s=30")
    ledger.leave(lease, LEASE_S)
    assert ledger.take_released() == []


def test_a_computing_request_has_no_deadline() -> None:
    ledger = make_ledger()
    ledger.open("r")
    ledger.announce("r", SourceProgress((3,), 4), 0.0)
    ledger.expire(100 * LEASE_S)
    assert ledger.take_released() == []


def test_a_computed_request_that_nobody_fetches_is_released_at_the_deadline() -> None:
    ledger = make_ledger()
    ledger.open("r")
    ledger.announce("r", SourceProgress((3,), 4, is_last=True), 5.0)
    ledger.expire(5.0 + LEASE_S - 0.1)
    assert ledger.take_released() == []
    ledger.expire(5.0 + LEASE_S)
    assert ledger.take_released() == ["r"]


def test_progress_of_the_reader_renews_the_lease_and_its_lack_ends_it() -> None:
    ledger = make_ledger()
    ledger.open("r")
    ledger.announce("r", SourceProgress((3,), 4, is_last=True), 0.0)
    lease = ledger.subscribe(ticket(), 0.0)
    ledger.touch(lease, 20.0)
    ledger.expire(20.0 + LEASE_S - 0.1)
    assert lease.is_reading
    ledger.expire(20.0 + LEASE_S)
    assert (lease.state, lease.error) == (LeaseState.ENDING, "the reader made no progress for lease_s=30")
    assert ledger.take_released() == [], "its connection is still there"
    ledger.leave(lease, 51.0)
    assert ledger.take_released() == ["r"]


def test_a_late_reader_is_told_why_there_is_nothing() -> None:
    ledger = make_ledger()
    ledger.open("r")
    ledger.close("r", "aborted by the client", 0.0)
    with pytest.raises(TransferError, match="aborted by the client"):
        ledger.subscribe(ticket(), 1.0)


@pytest.mark.parametrize(
    ("subscription", "words"),
    [
        (ticket(epoch=2), "epoch 2 of the ticket is not epoch 1"),
        (ticket(layout="other"), "layout other of the reader is not layout layout"),
        (ticket(first_block=-1), "first_block=-1"),
    ],
)
def test_a_wrong_ticket_is_refused_in_words(subscription: Subscribe, words: str) -> None:
    ledger = make_ledger()
    ledger.open("r")
    with pytest.raises(TransferError, match=words):
        ledger.subscribe(subscription, 0.0)
    assert ledger.subscribe(ticket(), 0.0).is_reading, "the refused one has changed nothing"


def test_a_second_reader_is_refused() -> None:
    ledger = make_ledger()
    ledger.open("r")
    ledger.subscribe(ticket(), 0.0)
    with pytest.raises(TransferError, match="has a reader already"):
        ledger.subscribe(ticket(), 0.0)


def test_only_announced_blocks_may_be_read() -> None:
    ledger = make_ledger()
    ledger.open("r")
    ledger.announce("r", SourceProgress((3, 5), 6), 0.0)
    lease = ledger.subscribe(ticket(), 0.0)
    ledger.next_piece(lease, 8)
    ledger.read(lease, (3,), 0.0)
    with pytest.raises(TransferError, match="not announced"):
        ledger.read(lease, (3, 5), 0.0)
    ledger.close("r", "aborted", 0.0)
    with pytest.raises(TransferError, match="aborted"):
        ledger.read(lease, (3,), 0.0)


def test_an_id_is_used_once() -> None:
    ledger = make_ledger()
    ledger.open("r")
    with pytest.raises(ValueError, match="opened before"):
        ledger.open("r")


# ---- pulls


def notice(index: int) -> BlockNotice:
    return BlockNotice(index, 100 + index, bytes(16))


def make_pull() -> PullSession:
    return PullSession("r", first_block=1, num_reserved=3, block_size_tokens=4)


def test_blocks_are_read_in_order_and_without_gaps() -> None:
    pull = make_pull()
    pull.announced(Announcement("r", (notice(1), notice(3)), 16))
    assert pull.next_notices(8) == [notice(1)]
    pull.verified(notice(1))
    assert pull.next_notices(8) == []
    pull.announced(Announcement("r", (notice(2),), 16))
    assert pull.next_notices(1) == [notice(2)]
    assert pull.next_notices(8) == [notice(2), notice(3)]


def test_repeated_announcements_change_nothing() -> None:
    pull = make_pull()
    first = Announcement("r", (notice(1),), 8)
    pull.announced(first)
    pull.verified(notice(1))
    pull.announced(first)
    assert (pull.next_notices(8), pull.num_verified, pull.is_complete) == ([], 1, False)


def test_verified_blocks_justify_their_tokens() -> None:
    pull = make_pull()
    assert pull.num_tokens == 4
    pull.announced(Announcement("r", (notice(1), notice(2)), 10, is_last=True, token_ids=(7,)))
    pull.verified(notice(1))
    assert (pull.num_tokens, pull.is_complete) == (8, False)
    pull.verified(notice(2))
    assert (pull.num_tokens, pull.is_complete, pull.token_ids) == (10, True, (7,))


@pytest.mark.parametrize(
    ("announcement", "words"),
    [
        (Announcement("other", (), 0), "announcement of request other"),
        (Announcement("r", error="prefill failed"), "prefill failed"),
        (Announcement("", error="epoch 2 is not epoch 1"), "epoch 2 is not epoch 1"),
        (Announcement("r", (notice(0),), 4), "block 0; reserved here are 3 from block 1"),
        (Announcement("r", (notice(4),), 20), "block 4; reserved here are 3"),
        (Announcement("r", (notice(1), notice(3)), 16, is_last=True), "never block 2"),
    ],
)
def test_an_announcement_that_makes_no_sense_ends_the_pull(announcement: Announcement, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        make_pull().announced(announcement)
