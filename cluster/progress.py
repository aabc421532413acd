"""How far the workers are with starting: told by each replica over a socket, heard by who waits for them.

A datagram socket of this host, not an actor: that would be one more process to start, while the others do.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from eagleray.core.clock import Clock

PROCESS_PHASE: Final = "process"  # until a replica runs: it cannot measure that itself, and says 0
REPORT_INTERVAL_S: Final = 0.2
STOP_DEADLINE_S: Final = 5.0
_POLL_S: Final = 0.2
_MAX_NOTE_BYTES: Final = 4096
_MAX_DESCRIPTION_CHARACTERS: Final = 800  # a compiler's error may be long, and a note has to arrive whole


class PhaseEnded(msgspec.Struct, frozen=True, tag="phase"):
    worker: str
    phase: str
    duration_s: float


class TensorsLoaded(msgspec.Struct, frozen=True, tag="tensors"):
    worker: str
    loaded: int
    total: int


class KernelsChosen(msgspec.Struct, frozen=True, tag="kernels"):
    worker: str
    description: str  # what it computes with; if that is not the best there is, why


Note = PhaseEnded | TensorsLoaded | KernelsChosen


class ProgressListener:
    """Hears the notes of all workers of this host until it is closed; ``on_note`` runs on its thread."""

    def __init__(self, on_note: Callable[[Note], None]) -> None:
        self._on_note = on_note
        self._folder = tempfile.TemporaryDirectory(prefix="eagleray-")
        self.address = str(Path(self._folder.name) / "progress")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.settimeout(_POLL_S)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """What was sent before is heard first."""
        self._closing.set()
        self._thread.join(STOP_DEADLINE_S)
        self._socket.close()
        self._folder.cleanup()

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(Note)
        while True:
            try:
                data = self._socket.recv(_MAX_NOTE_BYTES)
            except TimeoutError:
                if self._closing.is_set():
                    return
                continue
            except OSError:
                return
            with contextlib.suppress(msgspec.DecodeError):
                self._on_note(decoder.decode(data))


class ProgressReporter:
    """What one worker tells. Nobody waits for it, and nothing happens when nobody listens any more."""

    def __init__(self, address: str | None, worker: str, clock: Clock) -> None:
        self._address, self._worker, self._clock = address, worker, clock
        self._last_s: float | None = None  # since when nothing was told of tensors; None: none was loaded yet
        self._has_told_tensors = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def phase_ended(self, phase: str, duration_s: float) -> None:
        self._send(PhaseEnded(self._worker, phase, duration_s))

    def tensors_loaded(self, loaded: int, total: int) -> None:
        """To be called after every tensor; says it every ``REPORT_INTERVAL_S``, and the last one if any was
        said: what is loaded at once is not worth a word."""
        now_s = self._clock.now_s()
        if self._last_s is None:
            self._last_s = now_s
        if now_s - self._last_s >= REPORT_INTERVAL_S or (self._has_told_tensors and loaded == total):
            self._last_s, self._has_told_tensors = now_s, True
            self._send(TensorsLoaded(self._worker, loaded, total))

    def kernels_chosen(self, description: str) -> None:
        self._send(KernelsChosen(self._worker, description[:_MAX_DESCRIPTION_CHARACTERS]))

    def close(self) -> None:
        self._socket.close()

    def _send(self, note: Note) -> None:
        if self._address is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(msgspec.msgpack.encode(note), self._address)
