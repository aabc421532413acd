"""From the command line to a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagleray.cli.__main__ import build_parser
from eagleray.cli.options import config_from, given
from eagleray.core.config import Config
from eagleray.core.errors import ConfigError


def parse(*words: str) -> Config:
    return config_from(build_parser(words).parse_args(words))


def test_options_that_are_not_given_leave_the_defaults() -> None:
    assert parse("serve") == Config()


def test_options_come_on_top_of_the_file_and_set_on_top_of_both(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("http: {port: 1, host: 0.0.0.0}\nprefill: {replicas: 3, engine: {max_num_seqs: 5}}\n")
    config = parse("serve", str(path), "--port", "2", "--prefill", "4", "--set", "prefill.engine.max_num_seqs=6")
    assert (config.http.port, config.http.host) == (2, "0.0.0.0")
    assert (config.prefill.replicas, config.prefill.engine.max_num_seqs) == (4, 6)


def test_set_takes_values_as_yaml_does() -> None:
    config = parse(
        "serve", "--set", "transfer.transports=[tcp]", "--set", "index.url=null", "--set", "model.revision='1'"
    )
    assert config.transfer.transports == ("tcp",)
    assert config.index.url is None
    assert config.model.revision == "1"


def test_doctor_can_be_asked_about_any_key_that_serve_takes() -> None:
    words = ("--set", "speculation.method=ngram", "--set", "decode.replicas=3")
    asked = parse("doctor", *words)
    assert asked == parse("serve", *words)
    assert (asked.speculation and asked.speculation.method, asked.decode.replicas) == ("ngram", 3)


def test_every_short_option_reaches_its_key() -> None:
    words = "serve --model /m --dtype bfloat16 --prefill 1 --decode 3 --host ::1 --port 9"
    config = parse(*words.split())
    assert (config.model.path, config.model.dtype) == ("/m", "bfloat16")
    assert (config.prefill.replicas, config.decode.replicas) == (1, 3)
    assert (config.http.host, config.http.port) == ("::1", 9)


def test_a_section_and_a_key_in_it_contradict() -> None:
    with pytest.raises(ConfigError, match="http is given a value of its own as well"):
        parse("serve", "--set", "http=1", "--set", "http.port=2")


def test_sampling_options_are_those_that_were_given() -> None:
    words = ["generate", "--temperature", "0", "--stop", "a", "--stop", "b", "hi"]
    arguments = build_parser(words).parse_args(words)
    assert given(arguments, "sampling") == {"temperature": 0.0, "stop": ["a", "b"]}
