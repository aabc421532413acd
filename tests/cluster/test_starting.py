"""Parts of a start that can be tried without Ray's processes."""

from __future__ import annotations

import threading

import pytest

from eagleray.cluster.serve_app import _cause_in, within
from eagleray.core.errors import ConfigError

REPLICA_ERROR = "Traceback:\n  File ...\neagleray.core.errors.ConfigError: model.path='x': no such folder\n"


@pytest.mark.parametrize(
    ("message", "cause"),
    [(REPLICA_ERROR, "model.path='x': no such folder"), ("", "no reason was given"), ("\n \n", "no reason was given")],
)
def test_the_cause_is_the_last_line_of_what_serve_says_if_it_says_anything(message: str, cause: str) -> None:
    assert _cause_in(message) == cause


def test_a_start_that_does_not_end_is_given_up_at_its_deadline() -> None:
    may_end = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.05, "start", lambda: may_end.wait(5))
    may_end.set()


def test_what_a_start_returns_and_raises_comes_through() -> None:
    def fail() -> None:
        raise ConfigError("model.path", "x", "no such folder")

    assert within(5, "start", lambda: 7) == 7
    with pytest.raises(ConfigError, match="no such folder"):
        within(5, "start", fail)
