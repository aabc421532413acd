from __future__ import annotations

from eagleray.router.prefix_index.roster import Member, Roster, pack_incarnations, unpack_incarnations

ROSTER = Roster(read_s=0.0, newest=9, members={7: Member("x", 10.0), 8: Member("y", 10.0), 9: Member("z", 1.0)})


def test_rows_become_members_with_leases_on_the_readers_clock() -> None:
    rows = {b"newest": b"8", b"7": b"00000000000000000001:1500:a:b", b"8": b"00000000000000000002:900:y"}
    roster = Roster.parse(rows, server_time=(1, 250), now_s=100.0)
    assert roster.members == {7: Member("a:b", 100.5), 8: Member("y", 99.9)}
    assert roster.newest == 8
    assert roster.is_live(7, 100.0) and not roster.is_live(8, 100.0)


def test_holders_drop_out_where_they_are_first_missing() -> None:
    values = [pack_incarnations(numbers) for numbers in ([7, 8], [8, 7], [8], [8], [7, 8])]
    assert ROSTER.leading_blocks(values, now_s=0.0) == {"x": 2, "y": 5}


def test_a_missing_first_block_means_nobody() -> None:
    assert ROSTER.leading_blocks([None, pack_incarnations([7])], now_s=0.0) == {}
    assert ROSTER.leading_blocks([], now_s=0.0) == {}


def test_unknown_numbers_and_ended_leases_are_passed_over() -> None:
    values = [pack_incarnations([3, 7, 9])] * 2
    assert ROSTER.leading_blocks(values, now_s=0.0) == {"x": 2, "z": 2}
    assert ROSTER.leading_blocks(values, now_s=1.0) == {"x": 2}


def test_numbers_are_packed_in_four_bytes_each() -> None:
    numbers = (1, 2**32 - 1)
    assert unpack_incarnations(pack_incarnations(numbers)) == numbers
    assert pack_incarnations([258]) == b"\0\0\1\2"
