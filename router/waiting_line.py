"""Requests that found no room, in the order in which they came: only the first of them asks the workers again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from bisect import insort
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from eagleray.core.clock import Clock

_SMOOTHING: Final = 0.2  # weight of the newest wait


@dataclass(order=True, slots=True)
class _Place:
    ticket: int
    joined_s: float = field(compare=False)
    is_first: asyncio.Event = field(compare=False)


class WaitingLine:
    """First come, first served. While somebody is in the line, whoever comes joins its end instead of trying.

    A request that needs much, or that only a full class of workers could take, holds up all behind it (head-of-line
    blocking): a long prompt that waits for many blocks would otherwise never find them, as shorter ones would take each
    that becomes free.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tickets = itertools.count()
        self._places: list[_Place] = []  # by ticket
        self._usual_wait_s = 0.0  # of those that were served after waiting, smoothed

    def __len__(self) -> int:
        return len(self._places)

    def new_ticket(self) -> int:
        """A place in the order. A request keeps its own: when its worker is lost it comes before all newer ones."""
        return next(self._tickets)

    @contextlib.asynccontextmanager
    async def first(self, ticket: int, deadline_s: float) -> AsyncIterator[None]:
        """Inside it, the holder of ``ticket`` is the one that may try; the next one may when it is left.

        Raises ``TimeoutError`` when its turn has not come in ``deadline_s`` seconds.
        """
        place = _Place(ticket, self._clock.now_s(), asyncio.Event())
        insort(self._places, place)
        if len(self._places) == 1:
            place.is_first.set()
        try:
            async with asyncio.timeout(deadline_s):
                await place.is_first.wait()
            yield
            self._note_wait(self._clock.now_s() - place.joined_s)
        finally:
            self._places.remove(place)
            if self._places and not any(other.is_first.is_set() for other in self._places):
                self._places[0].is_first.set()

    @property
    def wait_s(self) -> float:
        """How long requests wait in the line, as measured: by those that were served, and by the oldest in it."""
        waiting = [self._clock.now_s() - place.joined_s for place in self._places]
        return max(self._usual_wait_s, *waiting, 0.0)

    def _note_wait(self, wait_s: float) -> None:
        old_s = self._usual_wait_s
        self._usual_wait_s = wait_s if old_s == 0.0 else old_s + _SMOOTHING * (wait_s - old_s)
