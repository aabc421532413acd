"""A file's lock: who waits for it, for how long, and who keeps it."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from eagleray.core.clock import ManualClock, SystemClock
from eagleray.models.file_lock import locked

WAIT_S = 10.0
CLOCK = SystemClock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"")
    return path


def can_be_had(path: Path) -> bool:
    """At once, by somebody else."""
    with path.open("r+b") as file, locked(file, ManualClock(), until_s=-1.0) as is_ours:
        return is_ours


def test_it_is_ours_alone_until_the_end_however_that_comes(path: Path) -> None:
    with path.open("r+b") as file:
        with locked(file, CLOCK, CLOCK.now_s() + WAIT_S) as is_ours:
            assert is_ours and not can_be_had(path)
        assert can_be_had(path)
        with pytest.raises(ZeroDivisionError), locked(file, CLOCK, CLOCK.now_s() + WAIT_S):
            raise ZeroDivisionError
        assert can_be_had(path)


def test_who_waits_has_it_when_the_other_gives_it_back(path: Path) -> None:
    class LetsGo(ManualClock):
        """Looked at by who waits: then the other gives it back."""

        def now_s(self) -> float:
            fcntl.flock(other, fcntl.LOCK_UN)
            return super().now_s()

    with path.open("r+b") as other, path.open("r+b") as file:
        fcntl.flock(other, fcntl.LOCK_EX)
        with locked(file, LetsGo(), until_s=1.0) as is_ours:
            assert is_ours


def test_at_the_deadline_it_is_not_ours_and_the_other_keeps_it(path: Path) -> None:
    class Hurries(ManualClock):
        def now_s(self) -> float:
            self.advance(0.6)
            return super().now_s()

    clock = Hurries()
    with path.open("r+b") as other, path.open("r+b") as file:
        fcntl.flock(other, fcntl.LOCK_EX)
        with locked(file, clock, until_s=1.0) as is_ours:
            assert not is_ours
        assert not can_be_had(path), "it was the other's to give back"
    assert clock.now_s() == pytest.approx(3 * 0.6), "two looks of who waited, and this one"


def test_a_process_that_has_inherited_the_file_does_not_keep_it(path: Path) -> None:
    program = "import sys; sys.stdin.read()"
    with path.open("r+b") as file, locked(file, CLOCK, CLOCK.now_s() + WAIT_S):
        heir = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, pass_fds=[file.fileno()])
    try:
        assert can_be_had(path), "although the file is still open there"
        assert heir.poll() is None
    finally:
        heir.communicate(timeout=WAIT_S)


def test_a_file_system_that_gives_no_lock_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: BinaryIO, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with path.open("r+b") as file:
        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.raises(OSError, match="no locks available"), locked(file, CLOCK, CLOCK.now_s() + WAIT_S):
            pass
