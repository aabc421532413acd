from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eagleray.core.config import Config, EngineConfig, ModelConfigSection, parse_config, with_kv_memory
from eagleray.core.errors import ConfigError
from eagleray.core.kv_layout import DTYPE_BYTES
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.execution.executor import build_executor
from eagleray.engine.execution.host_abilities import HostAbilities
from eagleray.engine.execution.memory_plan import (
    SERVICE_RUNTIME_BYTES,
    WORKER_RUNTIME_BYTES,
    WorkerNeeds,
    activation_bytes,
    format_size,
    plan_memory,
    replay_bytes,
    torch_bytes,
)
from eagleray.engine.execution.weight_memory import LinearBytes, packed_bytes, weight_bytes
from eagleray.engine.scheduling.plan import ScheduledRun, StepPlan
from eagleray.kernels.linear.reference import TorchQuantizedFormat
from eagleray.kernels.paged_attention.api import plan_attention
from eagleray.kernels.paged_attention.pieces import attention_bytes
from eagleray.kernels.paged_attention.reference import paged_attention
from eagleray.kernels.replay.arena import MAX_PROGRAMS
from eagleray.models.model_config import ModelConfig
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config

GIB = 2**30
MODEL = ModelConfig(
    model_type="qwen3",
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
    sliding_window=(None,) * 28,
    tie_word_embeddings=True,
    qk_norm=True,
    dtype="bfloat16",
)


def config(budget: int | str | None = None, **sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {"prefill": {"replicas": 1}, "decode": {"replicas": 1}, **sections}
    return parse_config({**values, "memory": {"budget_bytes": budget}})


def refusal(config: Config, available_bytes: int | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        plan_memory(config, MODEL, available_bytes)
    return str(error.value)


def test_pools_share_what_the_budget_leaves_and_the_total_stays_within_it() -> None:
    plan = plan_memory(config("6GiB"), MODEL, None)
    assert plan.prefill_kv_bytes == plan.decode_kv_bytes > GIB
    assert 6 * GIB - 2 <= plan.total_bytes <= 6 * GIB


def test_weights_count_once_where_they_are_shared_and_once_per_worker_where_not() -> None:
    shared = plan_memory(config("8GiB"), MODEL, None)
    assert shared.weights_bytes == weight_bytes(MODEL, "float32", LinearBytes())
    private = plan_memory(config("8GiB", model={"packed_weights_bytes": 0}), MODEL, None)
    assert private.weights_bytes == 2 * shared.weights_bytes
    in_torch = plan_memory(config("8GiB", model={"dtype": "float16"}), MODEL, None)
    assert in_torch.weights_bytes == 2 * weight_bytes(MODEL, "float16", LinearBytes(is_native=False))


def test_weights_take_two_bytes_where_the_checkpoint_or_the_computation_has_two() -> None:
    parameters = 28 * (1024 * 128 * (16 + 2 * 8 + 16) + 3 * 1024 * 3072) + 2 * 1024 * 32000
    assert (
        weight_bytes(MODEL, "float32", LinearBytes())
        == weight_bytes(MODEL, "bfloat16", LinearBytes())
        == 2 * parameters
    )


def test_quantised_linear_layers_count_a_byte_per_weight() -> None:
    linears = 28 * (1024 * 128 * (16 + 2 * 8 + 16) + 3 * 1024 * 3072) + 1024 * 32000
    assert weight_bytes(MODEL, "bfloat16", LinearBytes(quantization="w8a8")) == linears + 2 * 1024 * 32000


def test_without_packing_weights_are_of_the_dtype_that_computes_and_a_tied_head_costs_nothing() -> None:
    parameters = 28 * (1024 * 128 * (16 + 2 * 8 + 16) + 3 * 1024 * 3072) + 1024 * 32000
    assert weight_bytes(MODEL, "float32", LinearBytes(is_native=False)) == 4 * parameters
    torch_pool = {"replicas": 1, "engine": {"kernels": "torch"}}
    plan = plan_memory(config("12GiB", prefill=torch_pool, decode=torch_pool), MODEL, None)
    assert plan.weights_bytes == 2 * 4 * parameters
    in_the_order_of_onednn = 2 * (parameters + 1024 * 32000)  # the head beside the embedding
    assert weight_bytes(MODEL, "bfloat16", LinearBytes(is_native=False)) == in_the_order_of_onednn
    of_float32 = replace(MODEL, dtype="float32")  # whose embedding stays as it is
    assert (
        weight_bytes(of_float32, "bfloat16", LinearBytes(is_native=False)) == in_the_order_of_onednn + 2 * 1024 * 32000
    )


def test_the_weights_of_a_pool_are_those_of_its_own_kernels() -> None:
    torch_pool, native_pool = ({"replicas": 3, "engine": {"kernels": name}} for name in ("torch", "auto"))
    packed_bytes, plain_bytes = (weight_bytes(MODEL, "float32", LinearBytes(is_native=kind)) for kind in (True, False))
    for prefill, decode in ((torch_pool, native_pool), (native_pool, torch_pool)):
        plan = plan_memory(config("20GiB", prefill=prefill, decode=decode), MODEL, None)
        assert plan.weights_bytes == 3 * plain_bytes + packed_bytes
    none = {"replicas": 0, "engine": {"kernels": "auto"}}
    assert plan_memory(config("20GiB", prefill=none, decode=torch_pool), MODEL, None).weights_bytes == 3 * plain_bytes


@pytest.mark.parametrize("quantization", [None, "w8a8", "int8", "int4"])
def test_without_a_compiler_the_weights_are_those_that_torch_computes_from(quantization: Any) -> None:
    host = HostAbilities(has_native_kernels=False)
    plan = plan_memory(config("20GiB", model={"quantization": quantization}), MODEL, None, host=host)
    linears = LinearBytes(is_native=False, quantization=quantization)
    num_copies = 2 if quantization is None else 1  # quantised they lie in a file
    assert plan.weights_bytes == num_copies * weight_bytes(MODEL, "float32", linears)
    asked_for = {"replicas": 1, "engine": {"kernels": "native"}}  # the worker refuses that, in better words
    assert plan_memory(config("20GiB", prefill=asked_for, decode=asked_for), MODEL, None, host=host) == plan_memory(
        config("20GiB", prefill=asked_for, decode=asked_for), MODEL, None
    )


def test_without_room_for_a_file_of_packed_weights_each_worker_has_its_own() -> None:
    file_bytes = packed_bytes(MODEL, "float32", LinearBytes())
    limits = {"limit": {"packed_weights_bytes": file_bytes}, "disk": {}}
    for model, host in (
        (limits["limit"], HostAbilities()),
        (limits["disk"], HostAbilities(packed_room_bytes=file_bytes)),
        (limits["disk"], HostAbilities(packed_room_bytes=0, packed_sizes_bytes=(file_bytes // 2, 2 * file_bytes))),
    ):
        plan = plan_memory(config("20GiB", model=model), MODEL, None, host=host)
        assert plan.weights_bytes == 2 * weight_bytes(MODEL, "float32", LinearBytes())
    with_file = HostAbilities(packed_room_bytes=0, packed_sizes_bytes=(int(1.01 * file_bytes),))
    plan = plan_memory(config("20GiB"), MODEL, None, host=with_file)
    assert plan.weights_bytes == weight_bytes(MODEL, "float32", LinearBytes())


def test_what_torch_dequantises_at_one_time_is_a_piece_and_is_counted() -> None:
    host = HostAbilities(has_native_kernels=False)
    plain, quantised = (
        WorkerNeeds.of(config(model={"quantization": kind}), config().decode, MODEL, host) for kind in (None, "int8")
    )
    piece_bytes = quantised.private_bytes - plain.private_bytes
    x = torch.randn(1, 1024)
    for quantization in ("w8a8", "int8", "int4"):
        linear_format = TorchQuantizedFormat(quantization)  # type: ignore[arg-type]
        product = linear_format.bind(linear_format.pack(torch.randn(20_000, 1024), None))
        with PeakTracker() as tracker:
            product(x)
        assert tracker.peak_bytes <= piece_bytes < 4 * 20_000 * 1024


def test_a_budget_that_is_too_small_is_refused_and_the_least_that_is_named_is_enough() -> None:
    message = refusal(config("1GiB"))
    assert message.startswith("memory.budget_bytes='1GiB': the least that would do is")
    named = re.search(r"least that would do is (\S+)", message)
    assert named is not None
    plan = plan_memory(config(named.group(1)), MODEL, None)
    assert refusal(config(plan.total_bytes - 2**28))


def test_a_budget_over_what_is_free_is_refused() -> None:
    assert "only 4GiB are free" in refusal(config("6GiB"), 4 * GIB)


def test_without_a_budget_half_of_what_is_free_is_taken_and_too_little_is_refused() -> None:
    assert 10 * GIB - 2 <= plan_memory(config(), MODEL, 20 * GIB).total_bytes <= 10 * GIB
    assert "only 1GiB are free" in refusal(config(), GIB)


def test_a_service_that_needs_more_than_half_of_what_is_free_gets_its_smallest_pools() -> None:
    need = WorkerNeeds.of(config(), config().decode, MODEL)
    plan = plan_memory(config(), MODEL, 4 * GIB)
    assert plan.decode_kv_bytes == need.least_kv_bytes
    assert 2 * GIB < plan.total_bytes < 4 * GIB


def test_no_pool_is_larger_than_its_requests_can_use() -> None:
    plan = plan_memory(config(decode={"replicas": 1, "engine": {"max_num_seqs": 2}}), MODEL, None)
    block_bytes = MODEL.kv_layer_group("float32").block_bytes(16)
    assert plan.decode_kv_bytes == 2 * (4096 // 16 + 1) * block_bytes


def test_pools_of_a_given_size_stay_and_are_counted() -> None:
    sized = config("8GiB", decode={"replicas": 1, "engine": {"kv_memory_bytes": "1GiB"}})
    plan = plan_memory(sized, MODEL, None)
    assert plan.decode_kv_bytes == GIB
    assert plan.prefill_kv_bytes > GIB
    assert plan.total_bytes <= 8 * GIB
    assert "least" in refusal(config("4GiB", decode={"replicas": 1, "engine": {"kv_memory_bytes": "3GiB"}}))
    blocks = config("8GiB", decode={"replicas": 1, "engine": {"num_blocks": 10}})
    assert plan_memory(blocks, MODEL, None).decode_kv_bytes == 10 * MODEL.kv_layer_group("float32").block_bytes(16)


def test_the_length_that_a_user_asks_for_is_part_of_the_least() -> None:
    short, long = (WorkerNeeds.of(config(model={"max_model_tokens": n}), config().decode, MODEL) for n in (512, 4096))
    assert long.least_kv_bytes > 7 * short.least_kv_bytes
    block_bytes = MODEL.kv_layer_group("float32").block_bytes(16)
    assert long.least_kv_bytes == (4096 // 16 + 1) * block_bytes


def test_a_length_that_the_model_does_not_have_is_refused_with_a_way_out() -> None:
    assert refusal(config(model={"max_model_tokens": 4097})) == (
        "model.max_model_tokens=4097: this model serves up to 4096 tokens: positions end there; "
        "lower it or leave it out"
    )


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_a_length_that_a_pool_of_a_given_size_cannot_hold_is_refused(pool: str) -> None:
    fitting, smaller = ({pool: {"replicas": 1, "engine": {"num_blocks": number}}} for number in (32, 31))
    plan_memory(config(model={"max_model_tokens": 512}, **fitting), MODEL, None)
    message = refusal(config(model={"max_model_tokens": 512}, **smaller))
    assert message.startswith("model.max_model_tokens=512: the KV pool holds 496 tokens; lower it or raise")


def test_every_part_of_the_fixed_need_is_counted_per_worker() -> None:
    one = plan_memory(config(prefill={"replicas": 0}), MODEL, 2 * GIB + GIB // 2)
    activations = activation_bytes(MODEL, EngineConfig(), "float32") + replay_bytes(MODEL, EngineConfig(), "float32")
    fixed_bytes = SERVICE_RUNTIME_BYTES + WORKER_RUNTIME_BYTES + activations + one.weights_bytes
    assert one.total_bytes == fixed_bytes + one.decode_kv_bytes


def test_the_planned_pools_enter_the_configuration_where_it_has_none() -> None:
    sized = config(decode={"replicas": 1, "engine": {"num_blocks": 10}})
    planned = with_kv_memory(sized, GIB, 2 * GIB)
    assert planned.prefill.engine.kv_memory_bytes == GIB
    assert planned.decode.engine.kv_memory_bytes is None
    assert parse_config(planned.model_dump(mode="json")) == planned


@pytest.mark.parametrize(
    ("num_bytes", "shown"), [(6 * GIB, "6GiB"), (6 * GIB + 1, "6.1GiB"), (2**20 * 350, "350MiB"), (100, "100B")]
)
def test_sizes_are_rounded_up_and_can_be_typed_in_again(num_bytes: int, shown: str) -> None:
    assert format_size(num_bytes) == shown
    typed = config(shown).memory.budget_bytes
    assert typed is not None and typed >= num_bytes


# ---- the bound of activations against what is really allocated

SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 20000, "hidden_size": 256,
    "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip


class PeakTracker(TorchDispatchMode):
    """The most bytes at one time in storages that were made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Tensors in oneDNN's order have no storage to ask for.
        given = {
            ref(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor) and not each.is_mkldnn
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and ref(tensor) not in given:
                self._live[ref(tensor)] = tensor.untyped_storage().nbytes()
        self._live = {storage: num_bytes for storage, num_bytes in self._live.items() if not storage.expired()}
        self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))
        return result


def ref(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def full_step(engine: EngineConfig, num_runs: int) -> StepPlan:
    """As many tokens as a step takes, of so many requests."""
    sampling = SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=1, logprobs=5, repetition_penalty=1.1)
    num_tokens = engine.max_num_batched_tokens // num_runs
    runs = [
        ScheduledRun(
            RequestSpec(
                request_id=str(index),
                token_ids=tuple(token % 200 for token in range(num_tokens)),
                num_prompt_tokens=num_tokens,
                sampling=sampling,
                eos_token_ids=(2,),
            ),
            [token % 200 for token in range(num_tokens)],
            0,
            num_tokens,
            [index] if num_runs > 1 else list(range(-(-num_tokens // 16))),
            samples=True,
        )
        for index in range(num_runs)
    ]
    return StepPlan(runs=tuple(runs))


@pytest.mark.parametrize("shape", ["one long prompt", "many short ones"])
@pytest.mark.parametrize(("kernels", "dtype"), [("auto", "float32"), ("torch", "float32"), ("torch", "bfloat16")])
def test_a_full_step_stays_within_the_bound(tmp_path: Path, kernels: str, dtype: str, shape: str) -> None:
    save_random_checkpoint(tmp_path, SMALL, seed=0)
    engine = engine_with(kernels, max_num_batched_tokens=512, max_num_seqs=64)
    peak_bytes, bound = peak_and_bound(tmp_path, engine, dtype, 1 if shape == "one long prompt" else 64)
    assert peak_bytes > 2**20 * DTYPE_BYTES[dtype]  # it saw what there is
    assert peak_bytes <= bound


@pytest.mark.parametrize("intermediate_size", [64, 8192], ids=["attention", "MLP"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_torch_keeps_in_a_layer_stays_within_the_bound(tmp_path: Path, dtype: str, intermediate_size: int) -> None:
    qwen3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
    wide = {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": intermediate_size}
    save_random_checkpoint(tmp_path, SMALL | qwen3 | wide | {"vocab_size": 300}, seed=0)
    engine = engine_with("torch", max_num_batched_tokens=2048, max_num_seqs=2)
    peak_bytes, bound = peak_and_bound(tmp_path, engine, dtype, 1)
    gathered_bytes = 2 * 2048 * 8 * 128 * DTYPE_BYTES[dtype]
    unused_bytes = attention_bytes(2048 + 16, 128, DTYPE_BYTES[dtype], 2) - gathered_bytes  # its pieces are small here
    assert peak_bytes <= bound - unused_bytes


def engine_with(kernels: str, **limits: int) -> EngineConfig:
    return EngineConfig(kernels=kernels, num_blocks=512, **limits)  # type: ignore[arg-type]


def peak_and_bound(folder: Path, engine: EngineConfig, dtype: str, num_runs: int) -> tuple[int, int]:
    model, config = ModelConfigSection(path=str(folder), dtype=dtype), load_model_config(folder)  # type: ignore[arg-type]
    executor = build_executor(model, engine, num_threads=1)
    with PeakTracker() as tracker:
        executor._runner.run(full_step(engine, num_runs))
    bound = activation_bytes(config, engine, dtype)
    if engine.kernels == "torch":
        bound += torch_bytes(config, engine, dtype, executor.layout, executor.max_model_tokens, is_quantized=False)
    executor.close()
    return tracker.peak_bytes, bound


HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 8, 4, 16, 16


@pytest.mark.parametrize(
    ("counts", "prefixes"),
    [([1] * 64, [8000] * 64), ([1] * 3, [40, 8000, 100_000]), ([2048], [30_000]), ([6000], [0]), ([2], [100_000])],
    ids=["many that decode", "of different lengths", "a chunk after a long prefix", "a long prompt", "guesses"],
)
@pytest.mark.parametrize("window", [None, 1000])
def test_attention_by_torch_stays_within_its_bound_however_much_there_is_to_see(
    counts: list[int], prefixes: list[int], window: int | None
) -> None:
    lengths = [count + prefix for count, prefix in zip(counts, prefixes, strict=True)]
    tables = [[index % 8 for index in range(-(-length // BLOCK_TOKENS))] for length in lengths]
    kv_layer = torch.randn(8, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
    query = torch.randn(sum(counts), HEADS, HEAD_DIM)
    with torch.inference_mode(), PeakTracker() as tracker:
        plan = plan_attention(list(accumulate(counts, initial=0)), prefixes, tables, BLOCK_TOKENS, "cpu")
        plan_bytes = tracker.peak_bytes
        output = paged_attention(query, kv_layer, plan, 0.25, window)
    output_bytes = 3 * output.nbytes  # with that of a piece, as it is computed and as it is put in its place
    bound = attention_bytes(max(lengths) + BLOCK_TOKENS, HEAD_DIM, 4, HEADS // KV_HEADS)
    assert tracker.peak_bytes - plan_bytes - output_bytes <= bound < 2**27


def decoding_step(num_runs: int) -> StepPlan:
    """As many requests that want the best token."""
    runs = [
        ScheduledRun(
            RequestSpec(
                request_id=str(index),
                token_ids=(index,),
                num_prompt_tokens=1,
                sampling=SamplingParams(temperature=0.0),
                eos_token_ids=(2,),
            ),
            [index],
            0,
            1,
            [index],
            samples=True,
        )
        for index in range(num_runs)
    ]
    return StepPlan(runs=tuple(runs))


@pytest.mark.parametrize("kind", ["one prompt", "many that decode"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recording_and_replaying_a_step_of_many_layers_stay_within_the_bound(
    tmp_path: Path, dtype: str, kind: str
) -> None:
    decodes = kind == "many that decode"
    vocab_size = 20_000 if decodes else 500
    deep = SMALL | {"num_hidden_layers": 40, "vocab_size": vocab_size, "hidden_size": 512, "intermediate_size": 2048}
    save_random_checkpoint(tmp_path, deep, seed=0)
    model, engine = (
        ModelConfigSection(path=str(tmp_path), dtype=dtype),
        EngineConfig(  # type: ignore[arg-type]
            max_num_batched_tokens=128, max_num_seqs=64, num_blocks=128
        ),
    )
    executor = build_executor(model, engine, num_threads=1)
    plan = decoding_step(64) if decodes else full_step(engine, 1)
    executor._runner.run(plan)
    with PeakTracker() as recorded:
        executor._runner.run(plan)
    with PeakTracker() as replayed:
        executor._runner.run(plan)
    replayer: Any = executor._runner._replayer
    executor.close()
    (program,) = replayer._programs.values()
    assert not executor._runner._model._replayer._programs  # its steps are parts of these
    result_shapes = [tuple(shape) for shape, _ in program.results]
    assert result_shapes == ([(64, 512), (64, vocab_size), (64,)] if decodes else [(128, 512)])
    config = load_model_config(tmp_path)
    bytes_of_all_layers = 40 * 128 * (2 * 2048 + 8 * 512) * DTYPE_BYTES[dtype]
    bound = activation_bytes(config, engine, dtype)
    assert max(recorded.peak_bytes, replayed.peak_bytes) <= bound
    assert decodes or bound < bytes_of_all_layers
    num_kept_bytes = len(replayer._arena) + len(replayer._results)
    num_kept_bytes += MAX_PROGRAMS * (program.calls.nbytes + program.patches.nbytes)
    assert num_kept_bytes <= replay_bytes(config, engine, dtype) <= 2 * num_kept_bytes
