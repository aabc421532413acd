"""What all commands show alike: progress with elapsed seconds, units, and text that is safe to print."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final, TextIO

from eagleray.core.clock import Clock

# Control characters, but tab and newline, become their visible pictures: a model's text cannot steer the terminal.
_CONTROL_PICTURES: Final[Mapping[int, str]] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
}


class Progress:
    """Lines with the seconds since the start."""

    def __init__(self, clock: Clock, out: TextIO) -> None:
        self._clock, self._out = clock, out
        self._start_s = clock.now_s()

    def __call__(self, message: str) -> None:
        print(f"{self._clock.now_s() - self._start_s:6.1f} s  {message}", file=self._out, flush=True)


def printable(text: str) -> str:
    return text.translate(_CONTROL_PICTURES)


def write_now(text: str) -> None:
    """Print part of an answer as it arrives."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def dim(text: str, out: TextIO) -> str:
    return f"\x1b[2m{text}\x1b[0m" if out.isatty() else text


def format_ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def format_bytes(count: float) -> str:
    """With binary units and three digits or so: 512 B, 13.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def bar(share: float, width: int = 10) -> str:
    """``share`` of 1 as a bar of ``width`` characters."""
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "█" * filled + "░" * (width - filled)
