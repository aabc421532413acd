from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eagleray.core.config import EngineConfig, ModelConfigSection
from eagleray.core.errors import ConfigError
from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.execution import kv_memory
from eagleray.engine.execution.executor import LocalExecutor, build_executor
from eagleray.engine.execution.identity import compute_model_identity
from eagleray.engine.execution.kv_memory import num_blocks_for
from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.sampler import Choice, build_sampling_batch, choices_of
from eagleray.engine.scheduling.plan import BlockCopy, ScheduledRun, StepPlan, StepResult
from eagleray.kernels.sampling.batch import SamplingBatch
from eagleray.models.random_weights import random_model
from eagleray.models.registry import load_model_config
from eagleray.models.weight_names import checkpoint_views

BLOCK_SIZE = 4
NUM_BLOCKS = 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 61, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    views = checkpoint_views(random_model(load_model_config(folder), seed=0))
    save_file({name: view.clone() for name, view in views.items()}, folder / "model.safetensors")
    return folder


def build(checkpoint: Path, **options: object) -> LocalExecutor:
    engine = EngineConfig(block_size_tokens=BLOCK_SIZE, num_blocks=NUM_BLOCKS, num_host_blocks=4)
    return build_executor(ModelConfigSection(path=str(checkpoint)), engine, num_threads=1, **options)


@pytest.fixture
def executor(checkpoint: Path) -> Iterator[LocalExecutor]:
    executor = build(checkpoint)
    yield executor
    executor.close()


def make_spec(request_id: str = "a", num_tokens: int = 11, choice: int = 0, **sampling: object) -> RequestSpec:
    token_ids = tuple((7 * position + num_tokens) % 61 for position in range(num_tokens))
    return RequestSpec(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(**sampling),
        choice=choice,
        eos_token_ids=(60,),
    )


def make_run(spec: RequestSpec, block_ids: list[int], known: list[int], start: int, end: int) -> ScheduledRun:
    return ScheduledRun(spec, known, start, end - start, block_ids, samples=end == len(known))


def run_step(executor: LocalExecutor, *runs: ScheduledRun, **copies: tuple[BlockCopy, ...]) -> StepResult:
    return executor.submit(StepPlan(runs=runs, **copies)).result()


def generate(
    executor: LocalExecutor, specs: list[RequestSpec], tables: list[list[int]], chunk: int, num_tokens: int
) -> dict[str, list[int]]:
    """All requests together, each step the next ``chunk`` of what it has not computed."""
    known = {spec.request_id: list(spec.token_ids) for spec in specs}
    computed = dict.fromkeys(known, 0)
    while any(len(known[spec.request_id]) < len(spec.token_ids) + num_tokens for spec in specs):
        runs = []
        for spec, table in zip(specs, tables, strict=True):
            tokens, start = known[spec.request_id], computed[spec.request_id]
            runs.append(make_run(spec, table, tokens, start, min(start + chunk, len(tokens))))
            computed[spec.request_id] = runs[-1].end
        for request_id, sampled in run_step(executor, *runs).sampled.items():
            known[request_id].append(sampled[0].token_id)
    return {spec.request_id: known[spec.request_id][len(spec.token_ids) :][:num_tokens] for spec in specs}


VARIED = [
    make_spec("greedy", 11, temperature=0.0),
    make_spec("seeded", 5, seed=7),
    make_spec("choice", 5, choice=1, seed=7),
    make_spec("truncated", 17, seed=1, temperature=1.3, top_k=9, top_p=0.8),
    make_spec("min_p", 3, seed=2, min_p=0.05, temperature=2.0),
    make_spec("penalised", 8, seed=3, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=1.0),
    make_spec("biased", 6, seed=4, logit_bias={3: 2.0, 4: -100}, min_tokens=4, stop_token_ids=(5, 99)),
    make_spec("penalised greedy", 9, temperature=0.0, repetition_penalty=1.8),
]


def test_tokens_are_the_same_alone_in_a_batch_and_in_chunks(checkpoint: Path):
    executor = build(checkpoint)
    tables = [[*range(8 * index, 8 * index + 8)] for index in range(4)]
    for half in (VARIED[:4], VARIED[4:]):
        together = generate(executor, half, tables, chunk=100, num_tokens=8)
        chunked = generate(executor, half, tables[::-1], chunk=3, num_tokens=8)
        alone = [generate(executor, [spec], [[*range(9, 17)]], chunk=100, num_tokens=8) for spec in half]
        assert together == chunked == {key: value for result in alone for key, value in result.items()}
    executor.close()


def test_seed_choice_and_position_reach_the_noise(executor: LocalExecutor):
    specs = [make_spec("a", seed=7), make_spec("b", seed=7, choice=1), make_spec("c", seed=8), make_spec("d", seed=7)]
    outputs = generate(executor, specs, [[*range(8 * row, 8 * row + 8)] for row in range(4)], 100, 12)
    assert outputs["a"] == outputs["d"]
    assert len({tuple(output) for output in outputs.values()}) == 3


def test_a_continuation_from_its_own_tokens_goes_on_as_the_original(executor: LocalExecutor):
    spec = make_spec("a", 9, seed=5, presence_penalty=1.0, repetition_penalty=1.3)
    whole = generate(executor, [spec], [[*range(8)]], 100, 8)["a"]
    resumed = RequestSpec(
        request_id="b",
        token_ids=(*spec.token_ids, *whole[:3]),
        num_prompt_tokens=9,
        sampling=spec.sampling,
        eos_token_ids=spec.eos_token_ids,
    )
    assert generate(executor, [resumed], [[*range(8, 16)]], 100, 5)["b"] == whole[3:]


def test_swap_out_and_in_keeps_the_kv(executor: LocalExecutor):
    spec = make_spec("a", 8, temperature=0.0)
    known = [*spec.token_ids]
    expected = generate(executor, [spec], [[20, 21, 22]], 100, 2)["a"]
    known.append(run_step(executor, make_run(spec, [3, 4], known, 0, 8)).sampled["a"][0].token_id)
    run_step(executor, swap_out=(BlockCopy(3, 1), BlockCopy(4, 0)))
    other = make_spec("b", 8, temperature=0.0, max_tokens=1)
    run_step(executor, make_run(other, [4, 3], [9] * 8, 0, 8))
    again = run_step(executor, make_run(spec, [7, 4, 9], known, 8, 9), swap_in=(BlockCopy(1, 7), BlockCopy(0, 4)))
    assert [known[-1], again.sampled["a"][0].token_id] == expected


def test_prompt_logprobs_are_the_same_however_the_prompt_is_cut(executor: LocalExecutor):
    spec = make_spec("a", 70, prompt_logprobs=3)  # more rows than are scored at one time
    known, table = list(spec.token_ids), [*range(18)]
    whole = run_step(executor, make_run(spec, table, known, 0, 70)).prompt_logprobs["a"]
    cut = [
        entry
        for start, end in ((0, 1), (1, 30), (30, 69), (69, 70))
        for entry in run_step(executor, make_run(spec, table, known, start, end)).prompt_logprobs.get("a", [])
    ]
    assert [entry.token_id for entry in whole] == known[1:]
    assert [(entry.token_id, entry.rank, entry.top_ids) for entry in cut] == [
        (entry.token_id, entry.rank, entry.top_ids) for entry in whole
    ]
    assert [entry.logprob for entry in cut] == pytest.approx([entry.logprob for entry in whole], abs=1e-5)
    assert all(len(entry.top_ids) == 3 for entry in whole)


def test_logprobs_come_from_the_raw_logits_with_as_many_alternatives_as_asked(executor: LocalExecutor):
    plain = make_spec("a", temperature=0.0, logprobs=4)
    shaped = make_spec("b", seed=1, temperature=5.0, top_k=2, logit_bias={1: 100.0}, logprobs=2)
    silent = make_spec("c")
    known = list(plain.token_ids)
    runs = [
        make_run(spec, [4 * row, 4 * row + 1, 4 * row + 2], known, 0, 11)
        for row, spec in enumerate((silent, plain, shaped))
    ]
    sampled = run_step(executor, *runs).sampled
    first, second = sampled["a"][0].logprobs, sampled["b"][0].logprobs
    assert first.rank == 1 and first.token_id == first.top_ids[0] == sampled["a"][0].token_id
    assert second.top_ids == first.top_ids[:2]
    assert second.top_logprobs == pytest.approx(first.top_logprobs[:2], abs=1e-5)
    assert second.token_id == 1 and second.logprob < second.top_logprobs[0]
    assert sampled["c"][0].logprobs is None


def test_min_tokens_keeps_stop_tokens_out_until_then(executor: LocalExecutor):
    everything_else = dict.fromkeys(range(3, 60), -100.0)  # leaves 0, 1, 2 and the end token 60
    options = {"seed": 1, "logit_bias": {**everything_else, 60: 20.0}, "stop_token_ids": (2,)}
    held = generate(executor, [make_spec("a", min_tokens=5, **options)], [[*range(8)]], 100, 7)["a"]
    assert set(held[:5]) <= {0, 1} and held[5:] == [60, 60]
    free = generate(executor, [make_spec("b", min_tokens=5, ignore_eos=True, **options)], [[*range(8)]], 100, 7)["b"]
    assert free == [60] * 7


def test_a_bias_of_minus_100_forbids_whatever_the_temperature(executor: LocalExecutor):
    forbidden = dict.fromkeys(range(2, 61), -100.0)
    specs = [make_spec(str(seed), 3, seed=seed, temperature=100.0, logit_bias=forbidden) for seed in range(4)]
    outputs = generate(executor, specs, [[*range(8 * row, 8 * row + 8)] for row in range(4)], 100, 20)
    assert {token_id for output in outputs.values() for token_id in output} == {0, 1}


def choices(runs: list[ScheduledRun]) -> list[Choice]:
    return [choice for run in runs for choice in choices_of(run)]


def test_history_is_the_known_tokens_with_all_after_the_prompt_as_output():
    spec = make_spec("b", 3, frequency_penalty=1.0)
    runs = [
        make_run(make_spec("a", 5), [0], [9] * 5, 4, 5),
        make_run(spec, [0], [7, 8, 9, 10, 11], 4, 5),
        make_run(spec, [0], [7, 8, 9], 0, 3),
    ]
    penalties = build_sampling_batch(choices(runs), vocab_size=61, device="cpu").penalties
    assert penalties.rows.tolist() == [1, 2]
    assert penalties.history_rows.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert penalties.history_token_ids.tolist() == [7, 8, 9, 10, 11, 7, 8, 9]
    assert penalties.history_is_output.tolist() == [False, False, False, True, True, False, False, False]


def test_a_batch_holds_only_what_its_rows_ask_for():
    runs = [make_run(make_spec(str(row), 3, temperature=0.0), [0], [1, 2, 3], 0, 3) for row in range(2)]
    assert build_sampling_batch(choices(runs), vocab_size=61, device="cpu") == SamplingBatch()
    runs.append(make_run(make_spec("2", 3), [0], [1, 2, 3], 0, 3))
    batch = build_sampling_batch(choices(runs), vocab_size=61, device="cpu")
    assert batch.random.rows.tolist() == [2]
    assert batch.bias is batch.penalties is batch.random.top_k_top_p is batch.random.min_p is None


def test_what_a_step_meets_is_raised_by_its_result_and_the_next_step_runs(executor: LocalExecutor):
    spec = make_spec("a")
    known = list(spec.token_ids)
    broken = executor.submit(StepPlan(runs=(make_run(spec, [0], known, 0, 11),)))  # too few blocks
    following = executor.submit(StepPlan(runs=(make_run(spec, [0, 1, 2], known, 0, 11),)))
    with pytest.raises(ValueError, match="needs 3 blocks"):
        broken.result()
    assert "a" in following.result().sampled


READER = """
import mmap, os, sys
pid, fd, num_bytes, start, length = map(int, sys.argv[1:6])
handle = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)
view = mmap.mmap(handle, num_bytes, prot=mmap.PROT_READ)
sys.stdout.write(view[:16].hex() + " " + view[start:start + length].hex())
"""


def test_another_process_reads_a_block_of_a_shared_pool(checkpoint: Path):
    executor = build(checkpoint, shared_kv=True)
    spec = make_spec("a", 8)
    run_step(executor, make_run(spec, [5, 6], list(spec.token_ids), 0, 8))
    ref = executor.kv.shared_memory_ref()
    block_bytes = executor.layout.block_bytes
    start = executor.kv.group_offsets[0] + 6 * block_bytes
    arguments = [str(number) for number in (ref.pid, ref.fd, ref.num_bytes, start, block_bytes)]
    seen = subprocess.run([sys.executable, "-c", READER, *arguments], capture_output=True, timeout=30, check=True)
    cookie, block = seen.stdout.decode().split()
    expected = executor.kv.group(executor.layout.groups[0].name)[6].numpy().tobytes()
    assert any(expected)
    assert (bytes.fromhex(cookie), bytes.fromhex(block)) == (ref.cookie, expected)
    executor.close()
    assert executor.kv.shared_memory_ref() is None


def test_bytes_written_through_a_block_view_are_the_tensor():
    groups = (LayerGroup("target", 2, 2, 4, "float32"), LayerGroup("draft", 1, 1, 4, "bfloat16"))
    kv = KVTensors(KVLayout(BLOCK_SIZE, groups), num_blocks=3)
    for group, view in zip(groups, kv.block_views(2), strict=True):
        ones = torch.ones(group.block_shape(BLOCK_SIZE), dtype=kv.group(group.name).dtype)
        view[:] = bytes(ones.view(torch.uint8).flatten().tolist())
    for group in groups:
        assert kv.group(group.name)[2].eq(1).all()
        assert kv.group(group.name)[:2].eq(0).all()
    with pytest.raises(IndexError, match="block 3 of 3"):
        kv.block_views(3)


def test_a_pool_larger_than_free_memory_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv_memory, "available_host_bytes", lambda: 10_000)
    layout = KVLayout(BLOCK_SIZE, (LayerGroup("target", 2, 2, 4, "float32"),))
    with pytest.raises(ConfigError, match="only 10000 bytes"):
        KVTensors(layout, num_blocks=20)


def test_number_of_blocks_follows_the_memory_and_too_little_is_refused():
    layout = KVLayout(BLOCK_SIZE, (LayerGroup("target", 2, 2, 4, "float32"),))
    assert num_blocks_for(layout, 10 * layout.block_bytes + 1) == 10
    with pytest.raises(ConfigError, match=r"engine\.kv_memory_bytes"):
        num_blocks_for(layout, layout.block_bytes)


@pytest.mark.parametrize(("wanted", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_on_a_cpu_the_dtype_is_float32_unless_another_is_chosen(
    checkpoint: Path, tmp_path: Path, wanted: str, expected: str
):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "bfloat16"}))
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    engine = EngineConfig(block_size_tokens=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    executor = build_executor(ModelConfigSection(path=str(tmp_path), dtype=wanted), engine, num_threads=1)
    spec = make_spec("a")
    assert "a" in run_step(executor, make_run(spec, [0, 1, 2], list(spec.token_ids), 0, 11)).sampled
    executor.close()
    assert executor.layout.groups[0].dtype == expected


def test_length_limit_is_the_models_the_users_or_the_pools(checkpoint: Path):
    def limit(num_blocks: int, wanted: int | None) -> int:
        engine = EngineConfig(block_size_tokens=BLOCK_SIZE, num_blocks=num_blocks)
        model = ModelConfigSection(path=str(checkpoint), max_model_tokens=wanted)
        executor = build_executor(model, engine, num_threads=1)
        executor.close()
        return executor.max_model_tokens

    assert (limit(100, None), limit(100, 99), limit(10, None)) == (256, 99, 40)
    with pytest.raises(ConfigError, match="pool holds 40 tokens"):
        limit(10, 99)
    with pytest.raises(ConfigError, match="up to 256"):
        limit(100, 300)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_quantisation_that_the_shapes_rule_out_is_refused_by_name(checkpoint: Path, kernels: str) -> None:
    model = ModelConfigSection(path=str(checkpoint), quantization="int4", packed_weights_bytes=0)
    with pytest.raises(ConfigError, match=r"model\.quantization.*groups of 128 input features"):
        build_executor(model, EngineConfig(num_blocks=8, kernels=kernels), num_threads=1)


def test_model_identity_is_that_of_the_content(checkpoint: Path, tmp_path: Path):
    original = compute_model_identity(checkpoint)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((checkpoint / name).read_bytes())
    assert compute_model_identity(copy) == original
    assert compute_model_identity(copy, revision="2") != original
    assert len({compute_model_identity(copy, "", name) for name in (None, "w8a8", "int8", "int4")}) == 4
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert compute_model_identity(copy) != original


def test_a_large_file_is_sampled_from_its_first_to_its_last_byte(checkpoint: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    weights = tmp_path / "model.safetensors"
    identities = set()
    for position in (None, 0, 70 * 2**20 - 1):
        with weights.open("wb") as file:
            file.truncate(70 * 2**20)  # a hole: takes no space
            if position is not None:
                file.seek(position)
                file.write(b"x")
        identities.add(compute_model_identity(tmp_path))
    assert len(identities) == 3


def test_everything_is_loaded_on_the_thread_that_will_compute(checkpoint: Path):
    threads = set()
    engine = EngineConfig(block_size_tokens=BLOCK_SIZE, num_blocks=NUM_BLOCKS)
    executor = build_executor(
        ModelConfigSection(path=str(checkpoint)),
        engine,
        num_threads=1,
        progress=lambda loaded, total: threads.add(threading.current_thread().name),
    )
    executor.close()
    assert len(threads) == 1 and next(iter(threads)).startswith("eagleray-step")


def test_loading_is_given_up_at_its_deadline_which_is_named(checkpoint: Path):
    may_go_on = threading.Event()
    model = ModelConfigSection(path=str(checkpoint), load_deadline_s=0.05)
    with pytest.raises(ConfigError, match=r"model\.load_deadline_s=0\.05: .* is not loaded after so long; raise it"):
        build_executor(
            model,
            EngineConfig(block_size_tokens=BLOCK_SIZE, num_blocks=NUM_BLOCKS),
            progress=lambda loaded, total: may_go_on.wait(30) and None,
        )
    may_go_on.set()
