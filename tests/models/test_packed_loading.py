from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eagleray.core.clock import SystemClock
from eagleray.kernels.linear.api import PackedLinear
from eagleray.kernels.linear.reference import TorchLinear
from eagleray.kernels.select import TORCH_KERNELS, Kernels
from eagleray.models.decoder import Decoder
from eagleray.models.loader import load_model
from eagleray.models.model_config import ModelConfig
from eagleray.models.packed_weights import PackedWeightFiles
from eagleray.models.random_weights import random_model
from eagleray.models.weight_names import LM_HEAD, checkpoint_views, linear_names
from tests.support.mappings import mapped_kib, needs_smaps

CONFIG = ModelConfig(
    model_type="qwen2",
    vocab_size=17,
    hidden_size=8,
    intermediate_size=6,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position_embeddings=16,
    sliding_window=(None, None),
    qkv_bias=True,
)
Load = Callable[..., Decoder]


@dataclass
class RowFormat:
    """Weights as they are, counted."""

    layout: str | None = "rows"
    packed: list[torch.Size] = field(default_factory=list)

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        self.packed.append(weight.shape)
        tensors = {"weight": weight.float()} if bias is None else {"weight": weight.float(), "bias": bias.float()}
        return PackedLinear(tensors, *weight.shape)

    def bind(self, packed: PackedLinear) -> TorchLinear:
        return TorchLinear(packed.tensors["weight"], packed.tensors.get("bias"))


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    views = checkpoint_views(random_model(config, seed=1))
    save_file({name: view.bfloat16() for name, view in views.items()}, folder / "model.safetensors")


def load(folder: Path, config: ModelConfig, linear_format: RowFormat | None, **options: object) -> Decoder:
    kernels: Kernels = replace(TORCH_KERNELS, linear_format=linear_format)
    return load_model(folder, config, torch.float32, "cpu", kernels=kernels, **options)  # type: ignore[arg-type]


def outputs(decoder: Decoder) -> list[torch.Tensor]:
    """Of every linear layer, and the embedding."""
    products = [names.linear(torch.ones(2, _num_inputs(names.linear))) for names in linear_names(decoder)]
    return [decoder.embedding.float(), *products]


def _num_inputs(linear: torch.nn.Module) -> int:
    return int(linear.weight.shape[1])


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("keeps_files", [False, True])
def test_packed_layers_compute_what_plain_ones_do(tmp_path: Path, is_tied: bool, keeps_files: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=is_tied)
    write_checkpoint(tmp_path, config)
    files = PackedWeightFiles(tmp_path / "packed", "model", 2**30, SystemClock()) if keeps_files else None
    expected = outputs(load(tmp_path, config, None))
    for _ in range(2):  # the second time from the file, if there is one
        found = outputs(load(tmp_path, config, RowFormat(), packed_files=files))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_second_process_packs_nothing_and_tells_that_all_is_loaded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    files = PackedWeightFiles(tmp_path / "packed", "model", 2**30, SystemClock())
    first, second = RowFormat(), RowFormat()
    calls: list[tuple[int, int]] = []
    load(tmp_path, CONFIG, first, packed_files=files)
    load(tmp_path, CONFIG, second, packed_files=files, progress=lambda done, total: calls.append((done, total)))
    assert len(first.packed) == 4 * CONFIG.num_layers + 1
    assert second.packed == []
    assert calls[-1][0] == calls[-1][1] == len(checkpoint_views(random_model(CONFIG, seed=1)))


def test_a_format_without_a_layout_leaves_no_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    files = PackedWeightFiles(tmp_path / "packed", "model", 2**30, SystemClock())
    load(tmp_path, CONFIG, RowFormat(layout=None), packed_files=files)
    assert not (tmp_path / "packed").exists()


def test_without_room_for_the_file_each_process_packs_for_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, CONFIG)
    files = PackedWeightFiles(tmp_path / "packed", "model", 1, SystemClock())
    calls: list[int] = []
    found = load(tmp_path, CONFIG, RowFormat(), packed_files=files, progress=lambda done, total: calls.append(done))
    assert torch.equal(outputs(found)[1], outputs(load(tmp_path, CONFIG, None))[1])
    assert len(caplog.records) == 1
    assert "has room for 1 bytes" in caplog.text
    assert max(calls) == len(checkpoint_views(random_model(CONFIG, seed=1)))


def test_the_embedding_is_the_file_and_no_linear_layer_keeps_a_second_copy(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, CONFIG)
    decoder = load(tmp_path, CONFIG, RowFormat())
    assert decoder.embedding.dtype is torch.bfloat16  # as stored
    assert all(names.linear.weight.numel() == 0 for names in linear_names(decoder))
    assert LM_HEAD in checkpoint_views(random_model(CONFIG, seed=1))


@needs_smaps
def test_what_packing_has_read_of_the_checkpoint_is_not_in_memory_afterwards(tmp_path: Path) -> None:
    config = replace(CONFIG, intermediate_size=2**16)
    write_checkpoint(tmp_path, config)
    files = PackedWeightFiles(tmp_path / "packed", "model", 2**30, SystemClock())
    path = tmp_path / "model.safetensors"
    decoder = load(tmp_path, config, RowFormat(), packed_files=files)
    assert float(decoder.embedding.sum()) != 0.0
    assert mapped_kib(path)["Rss"] * 1024 < path.stat().st_size / 4
