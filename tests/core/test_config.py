"""Configuration: what is wrong is named, what is given wins over the file, what is resolved cannot change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ValidationError

from eagleray.core import config as config_module
from eagleray.core.config import (
    DEMO_MODEL_PATH,
    Config,
    Environment,
    load_config,
    parse_config,
    prepare_ray_environment,
    read_environment,
    with_cores,
    with_environment,
)
from eagleray.core.errors import ConfigError

WRONG: list[tuple[dict[Any, Any], str, str]] = [
    ({"http": {"api_key": "two words"}}, "http.api_key", "match pattern"),
    ({"modell": {"path": "x"}}, "modell", "unknown key, perhaps model;"),
    ({"model": {"paht": "x"}}, "model.paht", "unknown key"),
    ({"engine": {"kernels": "torch"}}, "engine", "unknown key, perhaps prefill.engine or decode.engine;"),
    ({"decode": {"engine": {"num_blokcs": 3}}}, "decode.engine.num_blokcs", "unknown key"),
    ({"speculation": {"metod": "ngram"}}, "speculation.metod", "perhaps method"),
    ({"speculation": {"model": "x"}}, "speculation.method", "must be set beside model, to one of eagle3, .*, ngram$"),
    ({"speculation": {}}, "speculation.method", "must be set, to one of eagle3"),
    ({"speculation": {"method": "early_exit"}}, "speculation", "needs speculation.early_exit_layers"),
    ({"speculation": {"method": "ngram", "tree_branching": 2}}, "speculation", "no tree; leave tree_branching"),
    ({"speculation": {"method": "ngram", "tree_paths": [[0]]}}, "speculation", "no tree; leave tree_branching"),
    ({"http": {"port": 99999}}, "http.port", "65535"),
    ({"router": {"policy": "best"}}, "router.policy", "least_loaded"),
    ({"router": 3}, "router", "mapping"),
    ({"model": None}, "model", "mapping"),
    ({"transfer": {"transports": []}}, "transfer.transports", "at least 1"),
    ({"transfer": {"transports": ["carrier_pigeon"]}}, "transfer.transports.0", "shared_memory"),
    ({"decode": {"engine": {"watermark": 1.0}}}, "decode.engine.watermark", "less than 1"),
    ({"decode": {"engine": {"max_num_seqs": 513}}}, "decode.engine.max_num_seqs", r"=513: .* lower the first"),
    ({"decode": {"engine": {"max_num_batched_tokens": 63}}}, "decode.engine.max_num_seqs", "=64: .*_tokens=63;"),
    ({1: 2}, "1", "string"),
]


@pytest.mark.parametrize(("values", "field", "words"), WRONG, ids=[field for _, field, _ in WRONG])
def test_a_wrong_value_is_refused_naming_its_key_and_the_way_out(
    values: dict[Any, Any], field: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refusal:
        parse_config(values)
    assert refusal.value.field == field


class _Mandatory(BaseModel):
    port: int
    sizes: list[int]
    rows: int | None
    kind: Literal["new", "old"]


@pytest.mark.parametrize(
    ("key", "words"),
    [("port", ""), ("sizes", ""), ("rows", ""), ("kind", ", to one of new, old")],
)
def test_a_field_that_must_be_set_names_its_choices_where_it_has_some(
    monkeypatch: pytest.MonkeyPatch, key: str, words: str
) -> None:
    monkeypatch.setattr(config_module, "Config", _Mandatory)
    values = {"port": 1, "sizes": [1], "rows": 1, "kind": "new"}
    del values[key]
    with pytest.raises(ConfigError) as refusal:
        parse_config(values)
    assert str(refusal.value).endswith(f"must be set beside {', '.join(values)}{words}")


def test_an_empty_decode_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"decode\.replicas=0: at least 1"):
        parse_config({"decode": {"replicas": 0}})


PAIR: dict[str, Any] = {"prefill": {"replicas": 1}, "decode": {"replicas": 1}}
CORES: dict[str, tuple[dict[str, Any], int, tuple[str, int | None, int | None]]] = {
    "a pair with a core each": (PAIR, 2, ("shared", 2, 2)),
    "a pair with an odd core": (PAIR, 3, ("shared", 3, 3)),
    "a pair on one core": (PAIR, 1, ("shared", 1, 1)),
    "a pair with two cores each": (PAIR, 4, ("own", 2, 2)),
    "four workers with a core each": ({}, 4, ("own", 1, 1)),
    "aggregated workers": ({"prefill": {"replicas": 0}, "decode": {"replicas": 2}}, 2, ("own", 1, 1)),
    "more workers than cores, on their own": ({"cores": "own"}, 2, ("own", 1, 1)),
    "shared wherever it runs": ({**PAIR, "cores": "shared"}, 16, ("shared", 16, 16)),
    "threads of one pool are set": ({**PAIR, "decode": {"replicas": 1, "num_threads": 1}}, 2, ("own", 1, 1)),
    "threads are set, and turns too": (
        {"prefill": {"replicas": 1, "num_threads": 4}, "decode": {"replicas": 1, "num_threads": 2}, "cores": "shared"},
        4,
        ("shared", 4, 2),
    ),
}


@pytest.mark.parametrize("case", CORES)
def test_workers_share_the_cores_of_a_machine_that_has_few_unless_told_otherwise(case: str) -> None:
    values, num_cores, expected = CORES[case]
    config = with_cores(parse_config(values), num_cores)
    assert (config.cores, config.prefill.num_threads, config.decode.num_threads) == expected


def test_more_requests_than_tokens_in_a_step_are_fine_where_none_decodes() -> None:
    few_tokens = {"max_num_batched_tokens": 32}
    assert parse_config({"prefill": {"engine": few_tokens}, "decode": {"engine": few_tokens | {"max_num_seqs": 32}}})


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"replicas": 0}, "decode.replicas"),
        ({"engine": {"max_num_seqs": 513}}, "decode.engine.max_num_seqs"),
        ({"engine": {"block_size_tokens": 8}}, "prefill.engine.block_size_tokens"),
    ],
)
def test_what_is_wrong_between_sections_is_said_without_the_secrets_of_others(
    wrong: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config({"http": {"api_key": "a-secret-key"}, "decode": wrong})
    assert refusal.value.field == field and "a-secret-key" not in str(refusal.value)


def test_pools_of_two_block_sizes_are_refused_naming_both() -> None:
    sizes = {"prefill": {"engine": {"block_size_tokens": 8}}, "decode": {"engine": {"block_size_tokens": 32}}}
    with pytest.raises(ConfigError, match=r"prefill\.engine\.block_size_tokens=8: .*=32 differs"):
        parse_config(sizes)


def test_the_block_size_of_a_prefill_pool_that_does_not_exist_is_nobodys_business() -> None:
    assert parse_config({"prefill": {"replicas": 0}, "decode": {"engine": {"block_size_tokens": 32}}})


def test_nothing_given_is_the_demo_model_on_defaults() -> None:
    config = load_config()
    assert config == Config() == parse_config({})
    assert (config.model.folder, config.model.name) == (DEMO_MODEL_PATH, "eagleray-demo")


@pytest.mark.parametrize(
    ("model", "name"),
    [({"path": "/models/Qwen3-8B"}, "Qwen3-8B"), ({"path": "/m/x", "served_name": "chat"}, "chat")],
)
def test_a_model_is_served_under_its_folders_name_or_the_one_given(model: dict[str, str], name: str) -> None:
    assert parse_config({"model": model}).model.name == name


def test_overrides_win_over_the_file_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "eagleray.yaml"
    file.write_text("decode:\n  replicas: 3\n  engine: {max_num_seqs: 5, num_blocks: 7}\nhttp: {port: 1234}\n")
    config = load_config(file, {"decode": {"engine": {"num_blocks": 9}}, "model": {"dtype": "float32"}})
    assert (config.decode.replicas, config.decode.engine.max_num_seqs, config.decode.engine.num_blocks) == (3, 5, 9)
    assert (config.http.port, config.model.dtype) == (1234, "float32")


def test_an_override_replaces_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    file = tmp_path / "eagleray.yaml"
    file.write_text("http:\n")
    assert load_config(file, {"http": {"port": 1}}).http.port == 1


@pytest.mark.parametrize("text", ["", "# nothing but words\n"])
def test_an_empty_file_is_all_defaults(text: str, tmp_path: Path) -> None:
    file = tmp_path / "eagleray.yaml"
    file.write_text(text)
    assert load_config(file) == Config()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: {path: [", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"- a\n- b\n", "top level must be a mapping"),
        (b"just text", "top level must be a mapping"),
        (b"!!python/object:os.system {}", "cannot be read"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_naming_it(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as refusal:
        load_config(file)
    assert "broken.yaml" in str(refusal.value)


def test_a_file_that_is_missing_is_refused_naming_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml.*cannot be read"):
        load_config(tmp_path / "absent.yaml")


def test_a_configuration_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.router.policy = "round_robin"  # type: ignore[misc]


def test_a_configuration_survives_the_journey_to_a_replica() -> None:
    config = parse_config({"transfer": {"transports": ["tcp"]}, "model": {"max_model_tokens": 99}})
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_the_environment_is_read_under_the_documented_names_and_nothing_else() -> None:
    environment = read_environment(
        {
            "EAGLERAY_REDIS_URL": "redis://a",
            "EAGLERAY_REDIS_SERVER": "/bin/b",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c",
            "EAGLERAY_API_KEY": "only-for-friends",
            "REDIS_URL": "redis://other",
        }
    )
    assert (environment.redis_url, environment.redis_server) == ("redis://a", "/bin/b")
    assert (environment.otlp_endpoint, environment.api_key) == ("http://c", "only-for-friends")
    assert read_environment({}).model_dump() == dict.fromkeys(Environment.model_fields)


def test_ray_phones_nobody_unless_the_user_said_so() -> None:
    untouched: dict[str, str] = {}
    prepare_ray_environment(untouched)
    assert untouched["RAY_USAGE_STATS_ENABLED"] == "0"
    chosen = {"RAY_USAGE_STATS_ENABLED": "1"}
    prepare_ray_environment(chosen)
    assert chosen["RAY_USAGE_STATS_ENABLED"] == "1"


def test_ray_looks_up_less_often_unless_the_user_said_so() -> None:
    names = (
        "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S",
        "RAY_raylet_report_resources_period_milliseconds",
    )
    untouched: dict[str, str] = {}
    prepare_ray_environment(untouched)
    assert [untouched[name] for name in names] == ["10000", "0.25", "1000"]
    chosen = dict.fromkeys(names, "7")
    prepare_ray_environment(chosen)
    assert [chosen[name] for name in names] == ["7"] * 3


def test_the_environment_fills_in_only_what_the_configuration_leaves_open() -> None:
    environment = read_environment(
        {"EAGLERAY_REDIS_URL": "redis://there", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel"}
    )
    filled = with_environment(parse_config({}), environment)
    assert (filled.index.url, filled.telemetry.otlp_endpoint) == ("redis://there", "http://otel")
    kept = with_environment(parse_config({"index": {"url": "redis://here"}}), environment)
    assert kept.index.url == "redis://here"


def test_a_stall_deadline_that_idle_workers_cannot_keep_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router\.stall_deadline_s"):
        parse_config({"router": {"stall_deadline_s": 1.5}})
