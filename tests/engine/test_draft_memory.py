"""What a draft adds to the plan is what loading it takes, and is known from headers alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eagleray.core.config import Config, EngineConfig, ModelConfigSection, SpeculationConfig, parse_config
from eagleray.core.errors import ConfigError
from eagleray.engine.execution.draft_memory import DraftNeeds
from eagleray.engine.execution.executor import build_executor
from eagleray.engine.execution.kv_memory import num_blocks_for
from eagleray.engine.execution.memory_plan import plan_memory
from eagleray.engine.execution.weight_memory import LinearBytes
from eagleray.kernels.linear.panels import PanelLinearFormat
from eagleray.kernels.native.build import NativeUnavailable
from eagleray.kernels.select import load_best_library
from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.draft_heads.stored_shapes import StoredTensor, head_shapes
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config

TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
METHODS = ("eagle", "eagle3", "medusa", "draft_model")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_random_checkpoint(folder, TARGET, seed=1)
    return folder


@pytest.fixture(scope="module")
def drafts(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in METHODS}
    for name in ("eagle", "eagle3", "medusa"):
        save_random_draft(folders[name], name, load_model_config(target), seed=2)  # type: ignore[arg-type]
    save_random_checkpoint(folders["draft_model"], TARGET | {"num_hidden_layers": 2}, seed=1)
    return folders


def speculating(drafts: dict[str, Path], method: str) -> SpeculationConfig:
    return SpeculationConfig(method=method, model=str(drafts[method]))  # type: ignore[arg-type]


def service(target: Path, speculation: SpeculationConfig | None, **memory: Any) -> Config:
    values: dict[str, Any] = {"model": {"path": str(target)}, "prefill": {"replicas": 1}, "decode": {"replicas": 1}}
    return parse_config(values | {"memory": memory, "speculation": speculation and speculation.model_dump()})


@pytest.mark.parametrize("method", METHODS)
def test_the_planned_groups_are_those_that_the_executor_keeps(
    target: Path, drafts: dict[str, Path], method: str
) -> None:
    speculation, model = speculating(drafts, method), load_model_config(target)
    needs = DraftNeeds.of(speculation, model, "float32", LinearBytes())
    executor = build_executor(
        ModelConfigSection(path=str(target)), EngineConfig(num_blocks=8), num_threads=1, speculation=speculation
    )
    assert executor.layout.groups == (model.kv_layer_group("float32"), *needs.groups)
    executor.close()


@pytest.mark.parametrize("method", ["eagle", "eagle3", "medusa"])
def test_unpacked_a_head_takes_the_bytes_of_its_tensors(target: Path, drafts: dict[str, Path], method: str) -> None:
    stored = load_file(next(drafts[method].glob("*.safetensors")))  # float32, as computed
    needs = DraftNeeds.of(
        speculating(drafts, method), load_model_config(target), "float32", LinearBytes(is_native=False)
    )
    assert needs.weights_bytes == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_draft_that_does_not_fit_beside_its_target_is_refused(
    target: Path, drafts: dict[str, Path], method: str
) -> None:
    model, speculation = load_model_config(target), speculating(drafts, method)
    alone, together = service(target, None), service(target, speculation)
    least = {config: _least_bytes(config, model) for config in (alone, together)}
    draft_bytes = DraftNeeds.of(speculation, model, "float32", LinearBytes()).weights_bytes
    assert least[together] >= least[alone] + 2 * draft_bytes  # each worker has its own
    budget_bytes = (least[alone] + least[together]) // 2
    plan_memory(service(target, None, budget_bytes=budget_bytes), model, None)
    with pytest.raises(ConfigError, match="the least that would do is"):
        plan_memory(service(target, speculation, budget_bytes=budget_bytes), model, None)


def _least_bytes(config: Config, model: Any) -> int:
    """What a plan takes that has no byte to spare: of free memory it takes half, or the least if that is more."""
    low, high = 0, 2**34
    while low < high:
        middle = (low + high) // 2
        try:
            plan_memory(config, model, middle)
            high = middle
        except ConfigError:
            low = middle + 1
    return low


def test_pools_with_a_draft_stay_within_the_budget(target: Path, drafts: dict[str, Path]) -> None:
    model, speculation = load_model_config(target), speculating(drafts, "eagle3")
    plan = plan_memory(service(target, speculation, budget_bytes=3 * 2**30), model, None)
    needs = DraftNeeds.of(speculation, model, "float32", LinearBytes())
    executor = build_executor(
        ModelConfigSection(path=str(target)),
        EngineConfig(kv_memory_bytes=plan.decode_kv_bytes),
        num_threads=1,
        speculation=speculation,
    )
    assert executor.num_blocks == num_blocks_for(executor.layout, plan.decode_kv_bytes)
    block_bytes = sum(group.block_bytes(16) for group in (model.kv_layer_group("float32"), *needs.groups))
    assert executor.num_blocks * block_bytes <= plan.decode_kv_bytes
    assert plan.total_bytes <= 3 * 2**30
    executor.close()


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "w8a8"])
def test_packed_linear_layers_take_the_planned_bytes_per_weight(quantization: Any) -> None:
    try:
        library = load_best_library(1)
    except NativeUnavailable as error:
        pytest.skip(str(error))
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = PanelLinearFormat(library, quantization or "bfloat16").pack(weight, None)
    per_weight = sum(tensor.nbytes for tensor in packed.tensors.values()) / weight.numel()
    planned = LinearBytes(quantization=quantization).per_weight("bfloat16", "bfloat16")
    # Not planned for: with 8 bits a scale per output feature, and with w8a8 the sum of its weights.
    assert planned <= per_weight <= planned * (1.01 if quantization == "w8a8" else 1.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_header_of_a_file_of_torch_tells_dtypes_and_shapes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.zeros(3, 4, dtype=dtype), "b": torch.nn.Parameter(torch.ones(5, dtype=dtype)),
               "d2t": torch.arange(6)}  # fmt: skip
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    name = str(dtype).removeprefix("torch.")
    assert head_shapes(tmp_path) == {
        "a": StoredTensor(name, (3, 4)), "b": StoredTensor(name, (5,)), "d2t": StoredTensor("other", (6,)),
    }  # fmt: skip


def test_the_method_must_be_the_drafts_before_anything_is_loaded(target: Path, drafts: dict[str, Path]) -> None:
    wrong = SpeculationConfig(method="medusa", model=str(drafts["eagle3"]))
    with pytest.raises(ConfigError, match=r"speculation\.method='medusa': .* holds a draft for method eagle3"):
        plan_memory(service(target, wrong), load_model_config(target), None)


def test_fewer_layers_than_the_model_has_can_guess_for_it_and_no_more(target: Path) -> None:
    def plan(num_layers: int) -> None:
        guessing = SpeculationConfig(method="early_exit", early_exit_layers=num_layers)
        plan_memory(service(target, guessing), load_model_config(target), None)

    plan(6)
    with pytest.raises(ConfigError, match=r"speculation\.early_exit_layers=7: the model has 7 layers; set fewer"):
        plan(7)


def test_planning_with_a_draft_does_not_import_torch() -> None:
    script = "import sys, eagleray.engine.execution.draft_memory; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
