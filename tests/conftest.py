"""Caches of the tests lie beside their checkout, not among the user's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Also for the processes that tests start. Kept between runs: a library is compiled once."""
    os.environ["XDG_CACHE_HOME"] = str(Path(config.rootpath) / ".pytest_cache" / "user")
