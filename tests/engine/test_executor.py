"""When a step counts as submitted, and who is kept waiting by one that does not end."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from eagleray.core.config import EngineConfig, ModelConfigSection, SpeculationConfig
from eagleray.core.errors import EagleRayError
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.execution import executor as execution
from eagleray.engine.execution.executor import LocalExecutor, build_executor
from eagleray.engine.scheduling.plan import BlockCopy, ScheduledRun, StepPlan
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 61, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
SPEC = RequestSpec(request_id="a", token_ids=(1, 2), num_prompt_tokens=2, sampling=SamplingParams())
PLAN = StepPlan(runs=(ScheduledRun(SPEC, (1, 2), 0, 2, (0,), samples=True),))
WAIT_S = 30.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a model and of a draft head for it."""
    model, head = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("head")
    save_random_checkpoint(model, CONFIG, seed=1)
    save_random_draft(head, "eagle3", load_model_config(model), seed=2)
    return model, head


def build(folders: tuple[Path, Path], with_head: bool = False, **engine: Any) -> LocalExecutor:
    model, head = folders
    return build_executor(
        ModelConfigSection(path=str(model)),
        EngineConfig(block_size_tokens=4, num_blocks=8, num_host_blocks=1, **engine),
        num_threads=1,
        speculation=SpeculationConfig(method="eagle3", model=str(head)) if with_head else None,
    )


@pytest.mark.timeout(60)
@pytest.mark.parametrize("with_head", [False, True], ids=["alone", "with a head"])
def test_a_step_is_submitted_when_all_is_prepared_and_kernels_compute(
    folders: tuple[Path, Path], with_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then who submits it would only take the interpreter from who prepares it."""
    executor = build(folders, with_head)
    last_of_preparing = (execution.ModelRunner, "_ask")
    first_of_computing = (Decoder, "forward_with" if with_head else "forward")
    is_submitted, order = threading.Event(), list[str]()

    def noted(owner: type, name: str, word: str, must_be_submitted: bool) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            assert is_submitted.wait(WAIT_S if must_be_submitted else 0.05) == must_be_submitted
            order.append(word)
            return original(*arguments)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(execution, "_PREPARING_S", WAIT_S)
    noted(*last_of_preparing, "prepared", must_be_submitted=False)
    noted(*first_of_computing, "computed", must_be_submitted=True)
    step = executor.submit(PLAN)
    order.append("submitted")
    is_submitted.set()
    assert len(step.result().sampled["a"]) == 1
    assert order == ["prepared", "submitted", "computed"]
    executor.close()


@pytest.mark.timeout(20)
def test_a_step_that_only_copies_or_fails_is_submitted_too(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "_PREPARING_S", WAIT_S)
    executor = build(folders)
    assert executor.submit(StepPlan(swap_out=(BlockCopy(0, 0),))).result().sampled == {}
    monkeypatch.setattr(executor._runner, "run", lambda plan, on_compute: {}["failed"])
    with pytest.raises(KeyError, match="failed"):
        executor.submit(PLAN).result()
    executor.close()


@pytest.mark.timeout(60)
def test_nobody_waits_for_ever_for_a_step_and_closing_leaves_it_its_pool(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, closed = threading.Event(), list[bool]()
    executor = build(folders, step_deadline_s=0.05)
    monkeypatch.setattr(executor._runner, "run", lambda plan, on_compute: may_end.wait(120))
    monkeypatch.setattr(executor.kv, "close", lambda: closed.append(True))
    step = executor.submit(StepPlan())
    for waiting in (step.result, executor.close):
        with pytest.raises(EagleRayError, match=r"engine\.step_deadline_s=0\.05: a step has not ended"):
            waiting()
    assert closed == []
    may_end.set()
    executor._thread.shutdown()
    executor.close()
    assert closed == [True]
