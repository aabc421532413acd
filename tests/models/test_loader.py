from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eagleray.core.errors import ConfigError
from eagleray.models.loader import load_model
from eagleray.models.model_config import ModelConfig
from eagleray.models.random_weights import random_model
from eagleray.models.weight_names import checkpoint_views

CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=6,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position_embeddings=16,
    sliding_window=(None, None),
    qkv_bias=True,
    qk_norm=True,
)
ParametersOf = Callable[[object], Iterator[torch.nn.Parameter]]
DOWN = "model.layers.1.mlp.down_proj.weight"


def checkpoint(config: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in which no two values are alike."""
    return {name: view.clone() for name, view in checkpoint_views(random_model(config, seed=1)).items()}


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = list(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in halves.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder: Path, tensors: dict[str, torch.Tensor], config: ModelConfig = CONFIG) -> str:
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        load_model(folder, config, torch.float32, "cpu")
    return str(error.value)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_every_tensor_arrives_in_its_place(tmp_path: Path, is_sharded: bool) -> None:
    tensors = checkpoint()
    if is_sharded:
        write_shards(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    decoder = load_model(tmp_path, CONFIG, torch.float32, "cpu")
    assert {name: view.tolist() for name, view in checkpoint_views(decoder).items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_the_views_cover_every_parameter_exactly_once(parameters_of: ParametersOf) -> None:
    decoder = random_model(CONFIG, seed=1)
    for view in checkpoint_views(decoder).values():
        view.zero_()
    for view in checkpoint_views(decoder).values():
        view.add_(1)
    assert all(bool((parameter == 1).all()) for parameter in parameters_of(decoder))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in checkpoint().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    view = checkpoint_views(load_model(tmp_path, CONFIG, wanted, "cpu"))[DOWN]
    assert view.dtype is wanted
    assert torch.equal(view, tensors[DOWN].to(wanted))


def test_progress_counts_up_to_the_number_of_tensors(tmp_path: Path) -> None:
    tensors = checkpoint()
    save_file(tensors, tmp_path / "model.safetensors")
    calls: list[tuple[int, int]] = []
    load_model(tmp_path, CONFIG, torch.float32, "cpu", lambda done, total: calls.append((done, total)))
    assert calls == [(count + 1, len(tensors)) for count in range(len(tensors))]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = checkpoint()
    del tensors[DOWN]
    assert f"lacks {DOWN}" in refusal(tmp_path, tensors)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    assert "tensor model.layers.0.router.weight has no place" in refusal(
        tmp_path, checkpoint() | {"model.layers.0.router.weight": torch.zeros(2)}
    )


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    message = refusal(tmp_path, checkpoint() | {DOWN: torch.zeros(6, 8)})
    assert DOWN in message
    assert "[6, 8], config.json implies [8, 6]" in message


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    assert "torch.int8" in refusal(tmp_path, checkpoint() | {DOWN: torch.zeros(8, 6, dtype=torch.int8)})


def test_frequencies_stored_by_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    tensors = checkpoint() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    load_model(tmp_path, CONFIG, torch.float32, "cpu")


def test_a_tied_head_that_equals_the_embedding_is_accepted_and_one_that_differs_is_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=True)
    tensors = checkpoint(config)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    decoder = load_model(tmp_path, config, torch.float32, "cpu")
    assert decoder.lm_head.weight is decoder.embedding
    message = refusal(tmp_path, tensors | {"lm_head.weight": embedding + 1}, config)
    assert "tie_word_embeddings=True" in message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, checkpoint())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no b\.safetensors"):
        load_model(tmp_path, CONFIG, torch.float32, "cpu")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        load_model(tmp_path, CONFIG, torch.float32, "cpu")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"index\.json.*cannot be read"):
        load_model(tmp_path, CONFIG, torch.float32, "cpu")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(checkpoint(), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="is damaged"):
        load_model(tmp_path, CONFIG, torch.float32, "cpu")


def test_random_models_depend_on_the_seed_alone() -> None:
    first, again, other = (random_model(CONFIG, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
