"""Who is who in the index: incarnation numbers, their leases, and what a row of stored values means with them.

A block's value is the list of its holders: incarnation numbers of 4 bytes, big-endian. A number stands for one
(worker, epoch) and is not given out again, not even by a server that lost its data. So what a dead worker left behind
names nobody: it needs no purge, and a late write of it does no harm. What cannot be read (written by something else,
or by a later version) counts as absent.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

INCARNATION_BYTES: Final = 4
NEWEST_FIELD: Final = b"newest"  # in the roster's hash: the highest number given out
_ROW: Final = re.compile(rb"\d+:(\d{1,18}):(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    worker_id: str
    lease_until_s: float  # on the clock of whoever read it


@dataclass(frozen=True, slots=True)
class Roster:
    """The members at one moment, as one reader knows them."""

    read_s: float = float("-inf")
    newest: int = 0
    members: Mapping[int, Member] = field(default_factory=dict)  # by incarnation number

    @classmethod
    def parse(cls, rows: Mapping[bytes, bytes], server_time: tuple[int, int], now_s: float) -> Roster:
        """``rows``: number -> ``epoch:lease end in unix ms:worker id``, as the join script writes them.

        ``server_time`` is the server's (seconds, microseconds): leases are compared on its clock alone.
        """
        server_ms = server_time[0] * 1000 + server_time[1] // 1000
        members = {}
        for name, row in rows.items():
            number, parts = _parse_number(name), _ROW.fullmatch(row)
            if number and parts is not None:
                left_s = (int(parts[1]) - server_ms) / 1000
                members[number] = Member(parts[2].decode(errors="replace"), now_s + left_s)
        return cls(now_s, _parse_number(rows.get(NEWEST_FIELD, b"")), members)

    def belongs_to(self, worker_id: str, incarnation: int, now_s: float) -> bool:
        return self.is_live(incarnation, now_s) and self.members[incarnation].worker_id == worker_id

    def is_live(self, incarnation: int, now_s: float) -> bool:
        member = self.members.get(incarnation)
        return member is not None and now_s < member.lease_until_s

    def leading_blocks(self, values: Sequence[bytes | None], now_s: float) -> dict[str, int]:
        """worker id -> number of leading ``values`` that name it. Numbers without a live lease are passed over."""
        remaining = {number for number in self.members if self.is_live(number, now_s)}
        counts: dict[str, int] = {}
        previous: object = self  # which equals no value
        for depth, value in enumerate((*values, None)):  # the end is a block that nobody holds
            if value == previous:
                continue  # neighbours mostly have the same holders
            holders = remaining.intersection(unpack_incarnations(value or b""))
            if depth:
                counts.update({self.members[number].worker_id: depth for number in remaining - holders})
            remaining, previous = holders, value
            if not remaining:
                break
        return counts


def _parse_number(text: bytes) -> int:
    """0, which is nobody's, for what is not an incarnation number."""
    number = int(text) if text.isdigit() and len(text) <= 10 else 0
    return number if number < 2 ** (8 * INCARNATION_BYTES) else 0


def pack_incarnations(numbers: Sequence[int]) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


def unpack_incarnations(value: bytes) -> tuple[int, ...]:
    """Empty for what is not a list of numbers."""
    if len(value) % INCARNATION_BYTES:
        return ()
    return struct.unpack(f">{len(value) // INCARNATION_BYTES}I", value)
