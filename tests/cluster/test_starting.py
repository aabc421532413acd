"""Parts of a start that can be tried without Ray's processes."""

from __future__ import annotations

import threading

import pytest

from eagleray.cluster.serve_app import _cause_in, describe_cores, within
from eagleray.core.config import parse_config, with_cores
from eagleray.core.errors import ConfigError

REPLICA_ERROR = "Traceback:\n  File ...\neagleray.core.errors.ConfigError: model.path='x': no such folder\n"


@pytest.mark.parametrize(
    ("message", "cause"),
    [(REPLICA_ERROR, "model.path='x': no such folder"), ("", "no reason was given"), ("\n \n", "no reason was given")],
)
def test_the_cause_is_the_last_line_of_what_serve_says_if_it_says_anything(message: str, cause: str) -> None:
    assert _cause_in(message) == cause


@pytest.mark.parametrize(
    ("prefill_replicas", "said"),
    [
        (1, "cores: 2; threads that compute: 2 in each prefill worker, 2 in each decode worker, in turns"),
        (0, "cores: 2; threads that compute: 2 in each decode worker, at the same time"),
    ],
)
def test_the_start_says_how_cores_are_used(prefill_replicas: int, said: str) -> None:
    config = parse_config({"prefill": {"replicas": prefill_replicas}, "decode": {"replicas": 1}})
    assert describe_cores(with_cores(config, num_cores=2), num_cores=2) == said


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
