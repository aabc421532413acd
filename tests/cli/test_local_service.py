"""What happens around a service on this machine, without starting one."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from eagleray.cli.__main__ import build_parser, main
from eagleray.cli.demo import SPECULATION, _config
from eagleray.cli.local_service import (
    StopSignals,
    print_snippets,
    require_free_port,
    wait_until_ready,
    why_not_free,
)
from eagleray.core.clock import SystemClock
from eagleray.core.config import DEMO_DRAFT_PATH, Config, HTTPConfig, PoolConfig, SpeculationConfig, parse_config
from eagleray.core.errors import ConfigError
from eagleray.models.registry import load_model_config


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def own_handlers() -> Iterator[None]:
    """Of signals, put back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def demo_config(*words: str) -> Config:
    return _config(build_parser(["demo"]).parse_args(["demo", *words]))


def test_an_occupied_port_is_refused_before_anything_starts(
    taken_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", str(taken_port)]) == 2
    shown = capsys.readouterr()
    assert shown.err == (
        f"eagleray serve: http.port={taken_port}: is in use; choose another with --port, or --port 0 for any free one\n"
    )
    assert "loading Ray" not in shown.out


def test_layers_that_guess_but_that_the_model_does_not_have_are_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    guessing = ("--set", "speculation.method=early_exit", "--set", "speculation.early_exit_layers=99")
    assert main(["serve", "--port", "0", *guessing]) == 2
    shown = capsys.readouterr()
    num_layers = load_model_config(Config().model.folder).num_layers
    refusal = f"speculation.early_exit_layers=99: the model has {num_layers} layers; set fewer"
    assert shown.err == f"eagleray serve: {refusal}\n"
    assert shown.out == ""


def test_a_port_whose_owner_shares_it_is_occupied_all_the_same() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert why_not_free("127.0.0.1", listener.getsockname()[1]) is not None


def test_a_host_that_is_not_here_is_named() -> None:
    with pytest.raises(ConfigError, match=r"http.host='192.0.2.1': cannot listen on port 8000 there"):
        require_free_port(HTTPConfig(host="192.0.2.1"))


@pytest.mark.parametrize("api_key", [None, "only-for-friends"])
def test_a_service_is_waited_for_with_its_own_key(
    api_key: str | None, server: Any, locked_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EAGLERAY_API_KEY", raising=False)
    no_workers = PoolConfig(replicas=0)  # as the fake service has them
    config = Config().model_copy(
        update={"prefill": no_workers, "decode": no_workers, "http": HTTPConfig(api_key=api_key)}
    )
    wait_until_ready((locked_server if api_key else server).url, config, SystemClock())


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_told_of_at_once_and_only_once(number: signal.Signals) -> None:
    told: list[str] = []
    signals = StopSignals(lambda: told.append("stopping"))
    signals.install()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert told == ["stopping"]
    signals.begin_stop()  # what was started is undone
    assert told == ["stopping"]


@pytest.mark.usefixtures("own_handlers")
def test_a_stop_that_nobody_can_be_told_of_is_a_stop_all_the_same() -> None:
    def nobody_reads() -> None:
        raise BrokenPipeError

    StopSignals(nobody_reads).install()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_snippets_say_how_to_send_the_key_and_do_not_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_snippets("http://0.0.0.0:8000", parse_config({"http": {"api_key": "only-for-friends"}}))
    shown = capsys.readouterr().out
    assert "only-for-friends" not in shown
    assert '-H "Authorization: Bearer $EAGLERAY_API_KEY"' in shown
    assert 'api_key=os.environ["EAGLERAY_API_KEY"])' in shown and "import os\n" in shown
    print_snippets("http://0.0.0.0:8000", Config())
    shown = capsys.readouterr().out
    assert "EAGLERAY_API_KEY" not in shown and 'api_key="none")' in shown


def test_the_demo_guesses_with_the_packaged_head_wherever_its_port_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagleray.cli.demo.why_not_free", lambda host, port: 98 if port == 8000 else None)
    for config in (demo_config(), demo_config("--port", "8001")):
        assert config.speculation == SPECULATION == SpeculationConfig(method="eagle3", model="demo")
        assert config.speculation is not None and config.speculation.folder == DEMO_DRAFT_PATH


def test_the_demo_takes_the_next_free_port_if_none_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {8000, 8001}
    monkeypatch.setattr("eagleray.cli.demo.why_not_free", lambda host, port: 98 if port in taken else None)
    assert demo_config().http.port == 8002
    assert demo_config("--port", "8001").http.port == 8001


def test_the_demo_says_so_when_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagleray.cli.demo.why_not_free", lambda host, port: 98)
    with pytest.raises(ConfigError, match="and so are those after it; give one with --port"):
        demo_config()
