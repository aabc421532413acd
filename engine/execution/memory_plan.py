"""What a service needs in memory, counted before anything is started: from the budget follow the KV pools. No torch.

The bounds below are checked against measured peaks by tests and by ``benchmarks/startup.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from eagleray.core.config import Config, EngineConfig, PoolConfig
from eagleray.core.errors import ConfigError
from eagleray.core.kv_layout import DTYPE_BYTES, KVLayout, LayerGroup
from eagleray.engine.execution.draft_memory import DraftNeeds
from eagleray.engine.execution.host_abilities import ABLE_HOST, HostAbilities
from eagleray.engine.execution.weight_memory import LinearBytes, packed_bytes, weight_bytes
from eagleray.kernels.linear.pieces import PIECE_WEIGHT_BYTES, PIECE_WEIGHTS
from eagleray.kernels.paged_attention.pieces import attention_bytes
from eagleray.kernels.replay.arena import MAX_PROGRAMS, MAX_ROWS, PROGRAM_LAYER_BYTES
from eagleray.models.model_config import ModelConfig

# Resident, measured: Python, Ray and torch in a worker; all other processes of a service, the index's server included.
WORKER_RUNTIME_BYTES: Final = 350 * 2**20
SERVICE_RUNTIME_BYTES: Final = 900 * 2**20
SCORED_ROWS: Final = 64  # rows of logits that exist at one time for prompt log-probabilities
_LOGIT_COPIES: Final = 12  # float32 [rows, vocabulary] at one time, with penalties and log-probabilities
_SHARE_OF_FREE_MEMORY: Final = 0.5  # that a service without a budget takes
# Positions, block tables, results, and 6 MiB of attention's partial results: what grows with nothing large.
_SMALL_TENSORS_BYTES: Final = 16 * 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. The pools are of one worker each."""

    weights_bytes: int  # all copies, drafts included
    prefill_kv_bytes: int
    decode_kv_bytes: int
    total_bytes: int


def plan_memory(
    config: Config,
    model: ModelConfig,
    available_bytes: int | None,
    runtime_bytes: int = SERVICE_RUNTIME_BYTES,
    host: HostAbilities = ABLE_HOST,
) -> MemoryPlan:
    """The KV pools that fit: into ``memory.budget_bytes``, or else into half of ``available_bytes``.

    Pools that the configuration sizes itself stay as they are. ``available_bytes`` of None (unknown) limits nothing but
    pools of a service without a budget, which then get what their requests can use. ``runtime_bytes`` is what the
    processes take that are no workers. ``host`` says which kernels compute and whether workers can share weights.

    Raises ``ConfigError`` naming the least that would do.
    """
    needs = [
        WorkerNeeds.of(config, config.prefill, model, host, guesses=False),
        WorkerNeeds.of(config, config.decode, model, host),
    ]
    counts = (config.prefill.replicas, config.decode.replicas)
    weights_bytes = _all_weights_bytes(counts, needs)
    fixed_bytes = runtime_bytes + weights_bytes
    fixed_bytes += sum(count * need.private_bytes for count, need in zip(counts, needs, strict=True))
    least_bytes = fixed_bytes + sum(count * need.least_kv_bytes for count, need in zip(counts, needs, strict=True))
    _check(config, least_bytes, weights_bytes, available_bytes)
    num_elastic = sum(count for count, need in zip(counts, needs, strict=True) if need.given_kv_bytes is None)
    spare_bytes = (_budget_bytes(config, least_bytes, available_bytes) or 2**62) - least_bytes
    extra_bytes = spare_bytes // num_elastic if num_elastic else 0
    prefill, decode = (need.kv_bytes(extra_bytes) for need in needs)
    return MemoryPlan(weights_bytes, prefill, decode, fixed_bytes + counts[0] * prefill + counts[1] * decode)


def _all_weights_bytes(counts: Sequence[int], needs: Sequence[WorkerNeeds]) -> int:
    """Of all pools' workers: one copy for those that share, and one for each of the others and for each draft."""
    shared = [need.weights_bytes for count, need in zip(counts, needs, strict=True) if count and need.shares_weights]
    own = sum(
        count * (need.draft_bytes + (0 if need.shares_weights else need.weights_bytes))
        for count, need in zip(counts, needs, strict=True)
    )
    return own + max(shared, default=0)


def _budget_bytes(config: Config, least_bytes: int, available_bytes: int | None) -> int | None:
    if config.memory.budget_bytes is not None:
        return config.memory.budget_bytes
    return None if available_bytes is None else max(least_bytes, int(available_bytes * _SHARE_OF_FREE_MEMORY))


def _check(config: Config, least_bytes: int, weights_bytes: int, available_bytes: int | None) -> None:
    budget_bytes = config.memory.budget_bytes
    parts = (
        f"weights {format_size(weights_bytes)}, {config.prefill.replicas + config.decode.replicas} workers, "
        "and the smallest KV pools that the configuration allows"
    )
    if budget_bytes is not None and budget_bytes < least_bytes:
        way_out = f"the least that would do is {format_size(least_bytes)} ({parts}); raise it, or start fewer workers"
        raise ConfigError("memory.budget_bytes", format_size(budget_bytes), way_out)
    if available_bytes is not None and max(least_bytes, budget_bytes or 0) > available_bytes:
        way_out = f"only {format_size(available_bytes)} are free, and the least that would do is "
        way_out += f"{format_size(least_bytes)} ({parts}); "
        if budget_bytes is not None and least_bytes <= available_bytes:
            way_out += "lower it"
        else:
            way_out += "free some, start fewer workers, or lower engine.kv_memory_bytes where it is set"
        raise ConfigError("memory.budget_bytes", budget_bytes and format_size(budget_bytes), way_out)


@dataclass(frozen=True)
class WorkerNeeds:
    """Bytes that one worker needs."""

    weights_bytes: int
    shares_weights: bool  # with the other workers of the host
    draft_bytes: int  # weights of the draft, which are not shared
    private_bytes: int  # runtime, activations, host blocks
    least_kv_bytes: int
    most_kv_bytes: int  # more than all its requests can use, if each is as long as can be
    given_kv_bytes: int | None  # the configuration says it itself

    @classmethod
    def of(
        cls,
        config: Config,
        pool: PoolConfig,
        model: ModelConfig,
        host: HostAbilities = ABLE_HOST,
        guesses: bool = True,
    ) -> WorkerNeeds:
        """Of a worker of ``pool``, one that ``guesses`` if that is configured; the others keep the draft's KV all the
        same. Raises ``ConfigError`` for a length that model or pool do not have, or a draft that does not go with the
        model."""
        engine = pool.engine
        dtype = model.resolve_dtype(config.model.dtype, "cpu")
        linears = LinearBytes(host.computes_natively(engine, dtype), config.model.quantization)
        draft = DraftNeeds.of(config.speculation, model, dtype, linears)
        layout = KVLayout(engine.block_size_tokens, (model.kv_layer_group(dtype), *draft.groups))
        given_bytes: int | None = engine.kv_memory_bytes
        if engine.num_blocks is not None:
            given_bytes = engine.num_blocks * layout.block_bytes
        longest_tokens = model.resolve_max_model_tokens(config.model.max_model_tokens)
        if given_bytes is not None:
            require_room(config.model.max_model_tokens, given_bytes // layout.block_bytes * engine.block_size_tokens)
        least_tokens = longest_tokens
        if config.model.max_model_tokens is None:  # then the pool may limit it
            least_tokens = min(longest_tokens, engine.max_num_batched_tokens)
        max_nodes = draft.max_nodes if guesses else 0
        private_bytes = WORKER_RUNTIME_BYTES + engine.num_host_blocks * layout.block_bytes
        private_bytes += activation_bytes(model, engine, dtype, max_nodes, draft.feature_size)
        if linears.is_native:
            private_bytes += replay_bytes(model, engine, dtype, max_nodes)
        else:
            is_quantized = linears.quantization is not None
            private_bytes += torch_bytes(model, engine, dtype, layout, longest_tokens, is_quantized)
        return cls(
            weights_bytes=weight_bytes(model, dtype, linears),
            draft_bytes=draft.weights_bytes,
            shares_weights=linears.are_packed
            and host.can_keep(packed_bytes(model, dtype, linears), config.model.packed_weights_bytes),
            private_bytes=private_bytes,
            least_kv_bytes=given_bytes or _pool_bytes(layout, least_tokens),
            most_kv_bytes=engine.max_num_seqs * _pool_bytes(layout, longest_tokens),
            given_kv_bytes=given_bytes,
        )

    def kv_bytes(self, extra_bytes: int) -> int:
        """The pool with ``extra_bytes`` beyond the least."""
        if self.given_kv_bytes is not None:
            return self.given_kv_bytes
        return max(self.least_kv_bytes, min(self.least_kv_bytes + extra_bytes, self.most_kv_bytes))


def require_room(max_model_tokens: int | None, capacity_tokens: int) -> None:
    """Raises ``ConfigError`` when a user asks for sequences that are longer than a pool."""
    if max_model_tokens is not None and max_model_tokens > capacity_tokens:
        way_out = (
            f"the KV pool holds {capacity_tokens} tokens; lower it or raise engine.kv_memory_bytes (or num_blocks)"
        )
        raise ConfigError("model.max_model_tokens", max_model_tokens, way_out)


def _pool_bytes(layout: KVLayout, num_tokens: int) -> int:
    """Of a pool that holds a sequence of so many tokens, and a block to spare."""
    return (-(-num_tokens // layout.block_size_tokens) + 1) * layout.block_bytes


def activation_bytes(
    model: ModelConfig, engine: EngineConfig, dtype: str, max_draft_nodes: int = 0, feature_size: int = 0
) -> int:
    """Bound of what one step allocates with the native kernels: in a layer, or for logits and their samples.

    Every guess is a row of logits. Features for a draft last as long as the step, and are gathered once more for it.
    """
    token_bytes = _layer_token_bytes(model, dtype)
    guessed_rows = min(engine.max_num_seqs * (1 + max_draft_nodes), engine.max_num_batched_tokens)
    rows = max(engine.max_num_seqs, guessed_rows, SCORED_ROWS)
    logits_bytes = _LOGIT_COPIES * 4 * rows * model.vocab_size
    hidden_bytes = DTYPE_BYTES[dtype] * model.hidden_size * engine.max_num_batched_tokens
    step_bytes = max(token_bytes * engine.max_num_batched_tokens, hidden_bytes + logits_bytes)
    feature_bytes = 2 * DTYPE_BYTES[dtype] * feature_size * engine.max_num_batched_tokens
    return step_bytes + feature_bytes + _SMALL_TENSORS_BYTES


def replay_bytes(model: ModelConfig, engine: EngineConfig, dtype: str, max_draft_nodes: int = 0) -> int:
    """Bound of what recorded steps keep from step to step: programs, the arena that these share, and the latest step's
    results: logits, hidden states, a draft's feature. A draft's network has all of it for itself; in one of its
    programs a guess is a layer or so, and has logits."""
    rows = min(MAX_ROWS, engine.max_num_batched_tokens)
    arena_bytes = rows * _layer_token_bytes(model, dtype)
    program_bytes = MAX_PROGRAMS * PROGRAM_LAYER_BYTES
    sampled_rows = min(rows, engine.max_num_seqs * (1 + max_draft_nodes))
    result_bytes = 4 * sampled_rows * model.vocab_size + 2 * rows * DTYPE_BYTES[dtype] * model.hidden_size
    num_bytes = arena_bytes + result_bytes + program_bytes * (model.num_layers + 1)
    if max_draft_nodes:
        logits_bytes = 4 * min(rows, engine.max_num_seqs) * model.vocab_size
        num_bytes += arena_bytes + logits_bytes + program_bytes * (max_draft_nodes + 1)
    return num_bytes


def torch_bytes(
    model: ModelConfig, engine: EngineConfig, dtype: str, layout: KVLayout, longest_tokens: int, is_quantized: bool
) -> int:
    """Bound of what a step allocates beyond ``activation_bytes`` where torch computes: its operations keep more at one
    time, attention gathers what it reads, and quantised weights become floating-point numbers."""
    of_layers = engine.max_num_batched_tokens * _layer_token_bytes(model, dtype)
    longest_slots, group_size = longest_tokens + layout.block_size_tokens, model.num_heads // model.num_kv_heads
    of_attention = max(
        attention_bytes(longest_slots, group.head_dim, DTYPE_BYTES[group.dtype], group_size)
        for group in layout.groups
        if isinstance(group, LayerGroup)
    )
    return of_layers + of_attention + (PIECE_WEIGHTS * PIECE_WEIGHT_BYTES if is_quantized else 0)


def _layer_token_bytes(model: ModelConfig, dtype: str) -> int:
    """Of one token, in a layer."""
    hidden, head_dim = model.hidden_size, model.head_dim
    attention = (2 * model.num_heads + 2 * model.num_kv_heads + model.num_heads) * head_dim
    mlp = 3 * model.intermediate_size
    return DTYPE_BYTES[dtype] * (6 * hidden + max(attention, mlp)) + 6 * 4 * head_dim


def format_size(num_bytes: int) -> str:
    """In the unit that people write: 5.7GiB, 512MiB; rounded up, so that a least is enough when it is typed in."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if num_bytes >= unit:
            return f"{-(-num_bytes * 10 // unit) / 10:.1f}".removesuffix(".0") + name
    return f"{num_bytes}B"
