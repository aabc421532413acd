"""Configuration: frozen data with every default, and the only reader of environment variables.

People write YAML (``load_config``) or command-line options that become the same nested dictionary; unknown keys are
errors that name the key. A resolved ``Config`` is passed on whole or in parts; nothing else holds a default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from eagleray.core.config_sections import alike_key, choices_of, fields_below
from eagleray.core.errors import ConfigError

DEMO_MODEL: Final = "demo"
DEMO_MODEL_PATH: Final = Path(__file__).resolve().parent.parent / "models" / "demo"
DEMO_DRAFT_PATH: Final = DEMO_MODEL_PATH / "draft"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfigSection(_Frozen):
    """Which checkpoint, and in what precision."""

    path: str = Field(DEMO_MODEL, description="folder in Hugging Face format, or 'demo' for the packaged model")
    served_name: str | None = Field(
        None, description="name in the API; default: the folder's name, eagleray-demo for the demo model"
    )
    revision: str = Field("", description="enters the identity of KV blocks; set it when weights change in place")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: the checkpoint's; on a CPU float32, so that batching changes no answer, up to near-ties",
    )
    quantization: Literal["w8a8", "int8", "int4"] | None = Field(
        None,
        description="of linear layers, when a float checkpoint is loaded: w8a8 (weights and activations in 8 bits), "
        "int8 or int4 (weights only); needs float32 or bfloat16 on a CPU",
    )
    packed_weights_bytes: ByteSize = Field(
        ByteSize(32 * 2**30),
        ge=0,
        description="disk below the user's cache folder for weights in the form that computes, which all workers of a "
        "host and the next start map; 0: each worker packs for itself",
    )
    load_deadline_s: float = Field(
        600.0, gt=0, description="a model that is not loaded after so long is given up, and with it the start"
    )
    max_model_tokens: int | None = Field(None, ge=1, description="prompt plus output; default: the model's own limit")

    @property
    def folder(self) -> Path:
        return DEMO_MODEL_PATH if self.path == DEMO_MODEL else Path(self.path).expanduser()

    @property
    def name(self) -> str:
        return self.served_name or ("eagleray-demo" if self.path == DEMO_MODEL else self.folder.name)


class EngineConfig(_Frozen):
    """One worker's engine."""

    block_size_tokens: int = Field(16, ge=1, le=1024, description="tokens per KV block")
    num_blocks: int | None = Field(None, ge=2, description="KV blocks per worker; default: kv_memory_bytes / block")
    kv_memory_bytes: ByteSize | None = Field(
        None, ge=1, description="KV pool of one worker, when num_blocks is not given; default: its share of the memory"
    )
    num_host_blocks: int = Field(0, ge=0, description="blocks of host memory for preemption by swap; 0: recompute")
    max_num_seqs: int = Field(64, ge=1, description="requests in one step; where some decode, no more than its tokens")
    max_num_batched_tokens: int = Field(512, ge=1, description="tokens of one step, of prompts half while some decode")
    max_num_waiting: int = Field(1024, ge=1, description="requests that may queue on one worker; more are refused")
    scheduling_policy: Literal["fcfs", "priority", "shortest_prompt_first"] = Field(
        "fcfs", description="who is admitted first and preempted last"
    )
    enable_prefix_caching: bool = Field(True, description="keep computed blocks for requests with the same prefix")
    kernels: Literal["auto", "native", "torch"] = Field(
        "auto", description="auto: on a CPU the native library if there is a C compiler, otherwise torch"
    )
    watermark: float = Field(0.01, ge=0.0, lt=1.0, description="share of blocks kept free when admitting")
    step_deadline_s: float = Field(60.0, gt=0, description="a worker whose step takes longer is stuck: it is replaced")


class SpeculationConfig(_Frozen):
    """Guessing several tokens and verifying them in one step. Whether answers depend on it, ``verification`` says."""

    method: Literal["eagle3", "eagle", "medusa", "draft_model", "early_exit", "ngram"] = Field(
        description="who guesses: a draft head, a smaller model, the model's own first layers, or the text so far"
    )
    model: str | None = Field(
        None, description="folder of the draft head or smaller model, or 'demo' for the packaged head"
    )
    revision: str = Field("", description="as model.revision, of the draft")
    num_speculative_tokens: int = Field(3, ge=1, le=16, description="how many tokens ahead to guess")
    tree_branching: int = Field(
        1, ge=1, le=16, description="guesses followed up at each step ahead: a tree as EAGLE-2 grows it; 1: a chain"
    )
    tree_nodes: int = Field(0, ge=0, le=63, description="guesses that are verified, the most probable ones; 0: all")
    tree_paths: tuple[tuple[int, ...], ...] = Field(
        (), description="a fixed tree instead: each guess by the ranks that lead to it, such as [0, 2]"
    )
    verification: Literal["target_token", "rejection"] = Field(
        "target_token",
        description="target_token: a guess counts if it is the token that the model samples by itself; rejection: "
        "the classic rule for chains, which keeps the distribution, but what a seed gives depends on the guesses",
    )
    adaptive: bool = Field(True, description="guess less, or not at all, where it would not pay")
    early_exit_layers: int | None = Field(None, ge=1, description="layers that guess, for early_exit")
    prompt_lookup_min: int = Field(2, ge=1, description="shortest passage that is looked up, for ngram")
    prompt_lookup_max: int = Field(4, ge=1, description="longest passage that is looked up, for ngram")

    @property
    def folder(self) -> Path:
        """Of the draft; empty for methods without one."""
        return DEMO_DRAFT_PATH if self.model == DEMO_MODEL else Path(self.model or "").expanduser()

    @model_validator(mode="after")
    def _is_complete(self) -> SpeculationConfig:
        has_own_weights = self.method not in ("early_exit", "ngram")
        if has_own_weights != (self.model is not None):
            verb = "needs" if has_own_weights else "takes no"
            raise ValueError(f"method {self.method} {verb} speculation.model, the folder of a draft")
        if self.method == "early_exit" and self.early_exit_layers is None:
            raise ValueError("method early_exit needs speculation.early_exit_layers, about a quarter of the model's")
        if self.method != "early_exit" and self.early_exit_layers is not None:
            raise ValueError(f"method {self.method} takes no speculation.early_exit_layers; leave it out")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError("speculation.prompt_lookup_min is larger than prompt_lookup_max; lower it")
        has_tree = self.tree_branching > 1 or bool(self.tree_paths)
        if has_tree and self.method == "ngram":
            raise ValueError("method ngram finds one passage, no tree; leave tree_branching and tree_paths out")
        if has_tree and self.verification == "rejection":
            raise ValueError(
                "speculation.verification rejection is for chains; leave tree_branching and tree_paths out, or set "
                "target_token"
            )
        return self


class PoolConfig(_Frozen):
    """One pool of workers."""

    replicas: int = Field(2, ge=0, description="workers; 0 prefill workers: decode workers do both")
    num_cpus: float = Field(1.0, ge=0, description="what Ray accounts for one worker")
    num_threads: int | None = Field(
        None,
        ge=1,
        description="threads that compute in one worker, in native kernels and in torch; none: as many as the machine "
        "has cores for it, which are all of them where workers take turns",
    )
    drain_deadline_s: float = Field(60.0, gt=0, description="a stopped worker finishes its requests for so long")
    engine: EngineConfig = EngineConfig()


class RouterConfig(_Frozen):
    """How the ingress chooses workers and how long it waits."""

    policy: Literal["round_robin", "least_loaded", "prefix_aware", "predicted_time"] = Field(
        "predicted_time", description="how workers are chosen"
    )
    local_prefill_tokens: int = Field(
        32, ge=0, description="an uncached suffix up to this long is prefilled on the decode worker itself"
    )
    stall_deadline_s: float = Field(
        10.0, ge=2, description="a worker that says nothing for so long counts as dead; idle ones do twice a second"
    )
    submit_deadline_s: float = Field(5.0, gt=0, description="answer to a submit")
    silence_deadline_s: float = Field(120.0, gt=0, description="no token for so long: the request is tried elsewhere")
    queue_deadline_s: float = Field(60.0, gt=0, description="wait for a worker with room; then 503")
    max_queued: int = Field(1024, ge=1, description="requests waiting in one ingress; more get 429")
    max_attempts: int = Field(
        4, ge=1, description="attempts without a new token, and worker failures in all, before a request fails"
    )


class TransferConfig(_Frozen):
    """KV hand-over."""

    transports: tuple[Literal["shared_memory", "tcp", "loopback"], ...] = Field(
        ("shared_memory", "tcp"), min_length=1, description="in order of preference; the first that connects is used"
    )
    lease_s: float = Field(30.0, gt=0, description="a source keeps blocks for a reader for so long without progress")
    stall_deadline_s: float = Field(5.0, gt=0, description="a pull without progress for so long is given up")
    piece_bytes: int = Field(4 * 2**20, ge=4096, description="a pull looks for an abort after so many bytes")
    num_threads: int = Field(4, ge=1, description="concurrent pulls per worker")


class IndexConfig(_Frozen):
    """The cluster's prefix index."""

    backend: Literal["redis", "memory"] = Field(
        "redis", description="memory: each ingress keeps its own, told by the workers on their connections"
    )
    url: str | None = Field(None, description="redis://, rediss:// or unix://; none: a local server is started")
    timeout_s: float = Field(0.05, gt=0, description="no request ever waits longer for the index")
    breaker_failures: int = Field(3, ge=1, description="failures in a row after which the index is not asked")
    breaker_reset_s: float = Field(1.0, gt=0, description="then it is tried again so often")
    entry_ttl_s: int = Field(3600, ge=1, description="entries that nobody renews go after so long")
    lease_s: float = Field(10.0, gt=0, description="a worker that does not renew its slot for so long is forgotten")


class HTTPConfig(_Frozen):
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="0: any free one")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="larger requests get 413")
    api_key: str | None = Field(
        None, min_length=8, pattern=r"^[!-~]+$", description="asked of every client as a bearer token; none: open"
    )


class TelemetryConfig(_Frozen):
    otlp_endpoint: str | None = Field(None, description="OTLP/gRPC endpoint; none: tracing is off")
    service_name: str = Field("eagleray", description="service.name of the spans")


class MemoryConfig(_Frozen):
    """What a service on one machine may take."""

    budget_bytes: ByteSize | None = Field(
        None,
        ge=1,
        description="all processes of `eagleray serve` together, weights and KV included; none: half of what is free",
    )


class Config(_Frozen):
    """Everything. With ``prefill.replicas: 0`` the decode workers do both (aggregated serving)."""

    model: ModelConfigSection = ModelConfigSection()
    memory: MemoryConfig = MemoryConfig()
    cores: Literal["auto", "own", "shared"] = Field(
        "auto",
        description="own: each worker computes whenever it can; shared: workers of one machine take turns, step by "
        "step, each with all its threads; auto: shared where one prefill and one decode worker have fewer than "
        "two cores each and no num_threads is set",
    )
    prefill: PoolConfig = PoolConfig()
    decode: PoolConfig = PoolConfig()
    router: RouterConfig = RouterConfig()
    speculation: SpeculationConfig | None = Field(None, description="guess tokens ahead; none: off")
    transfer: TransferConfig = TransferConfig()
    index: IndexConfig = IndexConfig()
    http: HTTPConfig = HTTPConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _pools_fit_together(self) -> Config:
        """Raises ``ConfigError`` itself: else what is shown as wrong would be everything, with all passwords."""
        if self.decode.replicas < 1:
            raise ConfigError("decode.replicas", self.decode.replicas, "at least 1: requests end on a decode worker")
        seats, rows = self.decode.engine.max_num_seqs, self.decode.engine.max_num_batched_tokens
        if seats > rows:  # who decodes comes first in a step
            way_out = f"as many do not fit a step of decode.engine.max_num_batched_tokens={rows}"
            raise ConfigError("decode.engine.max_num_seqs", seats, f"{way_out}; lower the first or raise the second")
        ours, theirs = self.prefill.engine.block_size_tokens, self.decode.engine.block_size_tokens
        if self.prefill.replicas and ours != theirs:
            way_out = f"decode.engine.block_size_tokens={theirs} differs, and blocks travel as they are; set both alike"
            raise ConfigError("prefill.engine.block_size_tokens", ours, way_out)
        return self


def parse_config(values: Mapping[str, Any]) -> Config:
    """A ``Config`` from a nested dictionary; ``ConfigError`` names the first field that is wrong."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        # A misspelt key is also a missing one: what was written is named before what is lacking.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        location = first["loc"]
        field = ".".join(str(part) for part in location) or "config"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            alike = alike_key(Config, location)
            perhaps = f", perhaps {alike}" if alike else ""
            message = f"unknown key{perhaps}; `eagleray serve --help` lists those that there are"
        elif first["type"] == "model_type":
            message = f"must be a mapping, such as {{{next(iter(fields_below(Config, location)), 'key')}: ...}}"
        value = first["input"]
        if first["type"] == "missing":  # its input is the whole section
            beside = f" beside {', '.join(map(str, value))}" if value else ""
            choices = choices_of(fields_below(Config, location[:-1])[str(location[-1])])
            to_one = f", to one of {', '.join(choices)}" if choices else ""
            value, message = None, f"must be set{beside}{to_one}"
        raise ConfigError(field, value, message) from None


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """YAML file (or none: defaults), then ``overrides`` on top: a nested dictionary of the keys a user set."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError("config", str(path), f"cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError("config", str(path), f"cannot be read: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError("config", str(path), "the top level must be a mapping such as 'model: {path: ...}'")
        values = loaded or {}
    return parse_config(_merged(values, overrides or {}))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


class Environment(_Frozen):
    """The environment variables that we heed, read once at start."""

    redis_url: str | None = None  # EAGLERAY_REDIS_URL
    redis_server: str | None = None  # EAGLERAY_REDIS_SERVER: path of a server binary
    otlp_endpoint: str | None = None  # OTEL_EXPORTER_OTLP_ENDPOINT
    api_key: str | None = None  # EAGLERAY_API_KEY: what our own clients send


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    source = os.environ if environ is None else environ
    return Environment(
        redis_url=source.get("EAGLERAY_REDIS_URL"),
        redis_server=source.get("EAGLERAY_REDIS_SERVER"),
        otlp_endpoint=source.get("OTEL_EXPORTER_OTLP_ENDPOINT"),
        api_key=source.get("EAGLERAY_API_KEY"),
    )


def with_environment(config: Config, environment: Environment) -> Config:
    """``config`` with what the environment says where the configuration says nothing."""
    index, telemetry = config.index, config.telemetry
    index = index.model_copy(update={"url": index.url or environment.redis_url})
    telemetry = telemetry.model_copy(update={"otlp_endpoint": telemetry.otlp_endpoint or environment.otlp_endpoint})
    return config.model_copy(update={"index": index, "telemetry": telemetry})


def with_kv_memory(config: Config, prefill_bytes: int, decode_bytes: int) -> Config:
    """``config`` with the size of each pool's KV memory, of one worker, where it has none."""

    def sized(pool: PoolConfig, num_bytes: int) -> PoolConfig:
        engine = pool.engine
        if engine.num_blocks is not None or engine.kv_memory_bytes is not None:
            return pool
        engine = engine.model_copy(update={"kv_memory_bytes": ByteSize(num_bytes)})
        return pool.model_copy(update={"engine": engine})

    return config.model_copy(
        update={"prefill": sized(config.prefill, prefill_bytes), "decode": sized(config.decode, decode_bytes)}
    )


def with_cores(config: Config, num_cores: int) -> Config:
    """``config`` for one machine of so many cores: whether its workers share them, and with how many threads each
    computes, where it does not say."""
    pools = (config.prefill, config.decode)
    num_workers, cores = sum(pool.replicas for pool in pools), config.cores
    if cores == "auto":
        is_unset = all(pool.num_threads is None for pool in pools)
        # With more workers each would wait for the chunks of several: until then, on its own.
        is_short = all(pool.replicas == 1 for pool in pools) and num_cores < 2 * num_workers
        cores = "shared" if is_unset and is_short else "own"
    num_threads = num_cores if cores == "shared" else max(1, num_cores // num_workers)

    def sized(pool: PoolConfig) -> PoolConfig:
        return pool.model_copy(update={"num_threads": pool.num_threads or num_threads})

    return config.model_copy(update={"cores": cores, "prefill": sized(config.prefill), "decode": sized(config.decode)})


def prepare_ray_environment(environ: MutableMapping[str, str] | None = None) -> None:
    """Set what Ray reads from the environment, unless the user has. To be called before ray is imported."""
    target = os.environ if environ is None else environ
    for name, value in (
        ("RAY_USAGE_STATS_ENABLED", "0"),  # a server should not phone home unasked
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),  # workers without GPUs leave CUDA_VISIBLE_DEVICES alone
        # What happens ten times a second in idle processes takes a percent or two of two cores from those that compute.
        ("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "10000"),  # as often as Ray reports them
        ("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.25"),
        ("RAY_raylet_report_resources_period_milliseconds", "1000"),
    ):
        target.setdefault(name, value)
