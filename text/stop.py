"""Stop strings, found however tokens cut them, and never shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Passes text on up to a stop string. Holds back the longest end that may still become one.

    Of several stop strings the one that is complete first counts, and of two that end together the longer. So the
    result depends on the text alone, never on how it was cut into tokens.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """``(released text, matched stop string or None)``. After a match nothing more may be pushed.

        With ``may_stop`` False a stop string that this text completes is let through.
        """
        if not self._stop:
            return text, None
        text = self._held + text
        match = self._first_match(text) if may_stop else None
        if match is not None:
            begin, stop = match
            self._held = ""
            return text[: begin + len(stop)] if self._include else text[:begin], stop
        keep = len(text) - self._held_chars(text)
        self._held = text[keep:]
        return text[:keep], None

    def flush(self) -> str:
        """The text held back, when no more can come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = ((text.find(stop), stop) for stop in self._stop)
        matches = [(begin + len(stop), begin, stop) for begin, stop in found if begin >= 0]
        return min(matches)[1:] if matches else None

    def _held_chars(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that begins a stop string."""
        return max(_overlap(text, stop) for stop in self._stop)


def _overlap(text: str, stop: str) -> int:
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
