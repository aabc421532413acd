"""What the configuration says of a pool reaches what its workers compute with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eagleray.cluster.progress import ProgressReporter
from eagleray.cluster.worker_process import WorkerPlace, build_worker_process
from eagleray.core.clock import SystemClock
from eagleray.core.config import parse_config
from eagleray.core.snapshot import Role
from eagleray.core.start_phases import StartPhases
from eagleray.engine.execution.executor import LocalExecutor, build_executor
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.text.fake import save_byte_tokenizer

CHECKPOINT = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A model's. Afterwards torch computes with as many threads as before."""
    save_random_checkpoint(tmp_path, CHECKPOINT, seed=0)
    save_byte_tokenizer(tmp_path)
    num_threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize(("role", "num_threads"), [(Role.PREFILL, 2), (Role.DECODE, 1)])
def test_the_threads_of_a_pool_are_those_that_the_kernels_of_its_workers_use(
    folder: Path, role: Role, num_threads: int
) -> None:
    made: list[LocalExecutor] = []

    def new_executor(*arguments: Any, **options: Any) -> LocalExecutor:
        made.append(build_executor(*arguments, **options))
        return made[-1]

    engine = {"num_blocks": 8}
    config = parse_config(
        {
            "model": {"path": str(folder)},
            "prefill": {"num_threads": 2, "engine": engine},
            "decode": {"num_threads": 1, "engine": engine},
            "index": {"backend": "memory"},
        }
    )
    clock = SystemClock()
    process = build_worker_process(
        config,
        WorkerPlace(role=role, worker_id="w", epoch=1, host="127.0.0.1", turns_folder=None),
        clock,
        ProgressReporter(None, "w", clock),
        StartPhases(clock, lambda phase, duration_s: None),
        new_executor,
    )
    process.stop(0.0)
    (executor,) = made
    executor.close()
    if not executor.computes_with.startswith("native") or "without OpenMP" in executor.computes_with:
        pytest.skip(f"there are no threads to choose from: {executor.computes_with}")
    assert f"threads: {num_threads})" in executor.computes_with
