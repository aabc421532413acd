"""What a folder holds is found out and loaded whole, or refused with the tensor or field, its value and a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eagleray.core.errors import ConfigError
from eagleray.kernels.native.build import NativeUnavailable
from eagleray.kernels.select import select_kernels
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.eagle import EagleHead
from eagleray.models.draft_heads.load import load_draft
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.random_draft import DraftFormat, save_random_draft
from eagleray.models.draft_heads.weight_names import eagle_views, medusa_views
from eagleray.models.loader import load_model
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config

EAGLE_FORMATS: tuple[DraftFormat, ...] = ("eagle", "eagle3", "speculators")
DOWN = "layers.0.mlp.down_proj.weight"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def eagle_head(folder: Path, target: Decoder) -> EagleHead:
    head = load_draft(folder, target)
    assert isinstance(head, EagleHead)
    return head


def refusal(folder: Path, target: Decoder) -> str:
    with pytest.raises(ConfigError) as error:
        load_draft(folder, target)
    return str(error.value)


@pytest.mark.parametrize("draft_format", EAGLE_FORMATS)
def test_every_tensor_arrives_in_its_place(save: Any, target: Decoder, draft_format: DraftFormat) -> None:
    folder = save(draft_format)
    stored = load_file(folder / "model.safetensors")
    offsets = stored.pop("d2t", None)
    head = eagle_head(folder, target)
    views = {name: view.tolist() for name, view in eagle_views(head).items()}
    assert views == {name.replace("midlayer", "layers.0"): tensor.tolist() for name, tensor in stored.items()}
    drafts = torch.arange(head.config.draft_vocab_size)
    assert torch.equal(head.target_ids(drafts), drafts if offsets is None else drafts + offsets)


@pytest.mark.parametrize("changes", [{}, {"fc_norm": True}, {"norm_before_fc": True}], ids=str)
@pytest.mark.parametrize("draft_format", EAGLE_FORMATS)
def test_the_views_cover_every_parameter_exactly_once(
    save: Any, target: Decoder, parameters_of: Any, draft_format: DraftFormat, changes: dict[str, Any]
) -> None:
    head = eagle_head(save(draft_format, **changes), target)
    for view in eagle_views(head).values():
        view.zero_()
    for view in eagle_views(head).values():
        view.add_(1)
    assert len(list(parameters_of(head))) >= 7
    assert all(bool((parameter == 1).all()) for parameter in parameters_of(head))


@pytest.mark.parametrize("draft_format", EAGLE_FORMATS)
def test_a_head_in_a_pickle_is_the_same_head(save: Any, target: Decoder, draft_format: DraftFormat) -> None:
    folder = save(draft_format)
    expected = eagle_views(eagle_head(folder, target))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = eagle_views(eagle_head(folder, target))
    assert {name: view.tolist() for name, view in found.items()} == {
        name: view.tolist() for name, view in expected.items()
    }


def test_medusa_heads_come_from_safetensors_or_a_pickle(save: Any, target: Decoder) -> None:
    folder = save("medusa", medusa_num_heads=2, medusa_num_layers=2)
    stored = load_file(folder / "medusa_lm_head.safetensors")
    (folder / "medusa_lm_head.safetensors").rename(folder / "kept")
    torch.save(stored, folder / "medusa_lm_head.pt")
    from_pickle = load_draft(folder, target)
    (folder / "kept").rename(folder / "medusa_lm_head.safetensors")
    (folder / "medusa_lm_head.pt").unlink()
    for heads in (from_pickle, load_draft(folder, target)):
        assert isinstance(heads, MedusaHeads)
        views = {name: view.tolist() for name, view in medusa_views(heads).items()}
        assert views == {name: tensor.tolist() for name, tensor in stored.items()}


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run_it(save: Any, target: Decoder) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "ran",))

    folder: Path = save("eagle")
    (folder / "model.safetensors").unlink()
    torch.save({"fc.weight": Malicious()}, folder / "pytorch_model.bin")
    assert "holds more than tensors" in refusal(folder, target)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_refused(save: Any, target: Decoder, file: str) -> None:
    folder: Path = save("eagle3")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content[:-100])
    assert f"{file}': is damaged" in refusal(folder, target)


def test_a_copy_of_the_targets_embedding_is_not_kept(save: Any, target: Decoder) -> None:
    folder = save("speculators", tensors={"embed_tokens.weight": target.embedding.clone()})
    assert eagle_head(folder, target).embedding is None
    folder = save("speculators", tensors={"embed_tokens.weight": target.embedding + 1})
    assert eagle_head(folder, target).embedding is not None


def test_tensors_of_training_are_skipped(save: Any, target: Decoder) -> None:
    mask, weight = torch.zeros(20, dtype=torch.bool), torch.zeros(10, 8)
    eagle_head(save("speculators", tensors={"t2d": mask, "verifier_lm_head.weight": weight}), target)


def test_a_head_that_shares_output_layers_leaves_a_prepared_target_as_it_is(save: Any, tmp_path: Path) -> None:
    try:
        kernels = select_kernels("native", torch.float32, "cpu", 1)
    except NativeUnavailable as error:
        pytest.skip(str(error))
    model_folder = tmp_path / "target"
    model_folder.mkdir()
    save_random_checkpoint(model_folder, LLAMA, seed=4)
    target = load_model(model_folder, load_model_config(model_folder), torch.float32, "cpu", kernels=kernels)
    hidden = torch.randn(3, 8)
    before = target.compute_logits(hidden)
    head = load_draft(save("eagle"), target, kernels)
    assert isinstance(head, EagleHead)
    assert torch.equal(head.compute_logits(hidden), before)
    assert torch.equal(target.compute_logits(hidden), before)


def test_the_layers_that_version_3_reads_are_the_authors_choice_unless_named(save: Any, target: Decoder) -> None:
    ids = "eagle_aux_hidden_state_layer_ids"
    assert eagle_head(save("eagle3", fields={ids: None}), target).config.capture_layers == (2, 4, 5)
    assert eagle_head(save("eagle3", fields={ids: [1, 3, 7]}), target).config.capture_layers == (1, 3, 7)
    by_output = save("eagle3", fields={ids: None, "eagle_config": {ids: [1, 3, 5]}})
    assert eagle_head(by_output, target).config.capture_layers == (2, 4, 6)


def test_rope_theta_is_10000_when_absent_whatever_the_target_has(save: Any, target: Decoder) -> None:
    assert eagle_head(save("eagle3"), target).config.layers.rope.theta == 10_000


def test_a_heads_layer_group_is_named_draft_and_has_its_own_shape(save: Any, target: Decoder) -> None:
    folder = save("speculators", transformer_layer_config={"num_hidden_layers": 2, "head_dim": 6})
    group = eagle_head(folder, target).layer_group("float32")
    assert (group.name, group.num_layers, group.num_kv_heads, group.head_dim) == ("draft", 2, 1, 6)


def test_a_whole_model_drafts_from_its_own_layer_group(tmp_path: Path, target: Decoder) -> None:
    save_random_checkpoint(tmp_path, LLAMA, seed=4)
    draft = load_draft(tmp_path, target)
    assert isinstance(draft, Decoder)
    assert (draft.layer_group("float32", "draft").name, draft.layer_group("float32").name) == ("draft", "target")
    assert draft.layer_group("float32", "draft").num_layers == 2


def test_a_whole_model_with_another_vocabulary_is_refused_naming_both(tmp_path: Path, target: Decoder) -> None:
    save_random_checkpoint(tmp_path, LLAMA | {"vocab_size": 24}, seed=4)
    message = refusal(tmp_path, target)
    assert "vocab_size=24" in message
    assert "the target's is 20" in message


def test_random_drafts_depend_on_the_seed_alone(tmp_path: Path, target: Decoder) -> None:
    contents = []
    for index, seed in enumerate((1, 1, 2)):
        save_random_draft(tmp_path / str(index), "speculators", target.config, seed)
        contents.append((tmp_path / str(index) / "model.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]


TENSORS_REFUSED: list[tuple[DraftFormat, dict[str, torch.Tensor | None], str]] = [
    ("eagle", {DOWN: None}, f"lacks {DOWN}"),
    ("eagle3", {"midlayer.mlp.down_proj.weight": None}, f"lacks {DOWN}"),
    ("eagle3", {"norm.weight": None}, "lacks norm.weight"),
    ("medusa", {"1.1.weight": None}, "lacks 1.1.weight"),
    ("eagle", {"norm.weight": torch.zeros(8)}, "tensor norm.weight has no place"),
    ("eagle", {"fc.bias": torch.zeros(8)}, "tensor fc.bias has no place"),
    ("speculators", {"input_norm.weight": torch.zeros(24)}, "tensor input_norm.weight has no place"),
    ("medusa", {"3.1.weight": torch.zeros(20, 8)}, "lacks 2 tensors, the first of them 3.0.linear.weight"),
    ("medusa", {"2.2.weight": torch.zeros(20, 8)}, "tensor 2.2.weight has no place"),
    ("eagle", {"lm_head.weight": torch.zeros(20, 8)}, "lm_head.weight, which heads of versions 1 and 2 do not"),
    ("eagle", {"fc.weight": torch.zeros(8, 24)}, "fc.weight has shape [8, 24], config.json implies [8, 16]"),
    ("eagle3", {"fc.weight": torch.zeros(8, 16)}, "fc.weight has shape [8, 16], config.json implies [8, 24]"),
    ("medusa", {"0.0.linear.bias": torch.zeros(9)}, "0.0.linear.bias has shape [9], config.json implies [8]"),
    ("speculators", {DOWN: torch.zeros(8, 12, dtype=torch.int8)}, f"{DOWN} is torch.int8"),
    ("eagle3", {"d2t": None}, "draft_vocab_size=10: differs from vocab_size=20, so the checkpoint needs a tensor d2t"),
    (
        "eagle3",
        {"d2t": torch.zeros(9, dtype=torch.int64)},
        "d2t is torch.int64 [9]; draft_vocab_size implies int64 [10]",
    ),
    ("eagle3", {"d2t": torch.zeros(10)}, "d2t is torch.float32 [10]"),
    ("eagle3", {"d2t": torch.full((10,), 11)}, "d2t leads to ids outside the vocabulary of 20"),
    ("eagle3", {"lm_head.weight": None}, "the target's lm_head has 20 rows and the head has none of its own"),
]


@pytest.mark.parametrize(("draft_format", "tensors", "message"), TENSORS_REFUSED, ids=lambda part: str(part)[:40])
def test_tensors_that_do_not_fit_are_named(
    save: Any, target: Decoder, draft_format: DraftFormat, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    assert message in refusal(save(draft_format, tensors=tensors), target)


IDS = "eagle_aux_hidden_state_layer_ids"
FIELDS_REFUSED: list[tuple[DraftFormat, dict[str, Any], str]] = [
    *(
        ("speculators", {"speculators_model_type": kind}, f"speculators_model_type={kind!r}: is not supported")
        for kind in ("peagle", "dflash", "dspark", "mtp", "eagle")
    ),
    ("speculators", {"speculators_model_type": None, "speculators_config": {"algorithm": "x"}}, "eagle3 is"),
    ("speculators", {"transformer_layer_config": None}, "transformer_layer_config=None: is missing"),
    ("speculators", {"transformer_layer_config": {"model_type": "gemma3"}}, "model_type='gemma3'"),
    ("speculators", {"norm_before_fc": True, "fc_norm": True}, "excludes norm_before_fc"),
    ("speculators", {IDS: [0, 4, 4]}, f"{IDS}=[0, 4, 4]: the target has 8 layers"),
    ("speculators", {IDS: [2, 4, 8]}, f"{IDS}=[2, 4, 8]: the target has 8 layers; name some of 0 to 7"),
    ("speculators", {IDS: ["2"]}, "must be a list of layers"),
    ("speculators", {"target_hidden_size": 16}, "target_hidden_size=16: the target's hidden_size is 8"),
    ("speculators", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("eagle3", {"hidden_size": 16, "target_hidden_size": 8}, "hidden_size=16: the target's is 8, so its embed_tokens"),
    ("eagle3", {"hidden_size": 16}, "target_hidden_size=16: the target's hidden_size is 8"),
    ("eagle3", {"vocab_size": 24}, "vocab_size=24: the target's is 20"),
    ("eagle3", {"eagle_config": {"use_aux_hidden_state": False}}, "eagle_config.use_aux_hidden_state=False"),
    ("eagle", {"hidden_size": 16}, "hidden_size=16: the target's is 8, so its lm_head.weight does not fit"),
    ("eagle", {"vocab_size": 24}, "vocab_size=24: the target's is 20"),
    ("eagle", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("medusa", {"vocab_size": 24}, "vocab_size=24: the target's is 20"),
    ("medusa", {"hidden_size": 16}, "hidden_size=16: the target's is 8"),
    ("medusa", {"medusa_num_heads": 0}, "medusa_num_heads=0"),
    ("medusa", {"medusa_num_layers": None}, "medusa_num_layers=None: is missing"),
]


@pytest.mark.parametrize(("draft_format", "fields", "message"), FIELDS_REFUSED, ids=lambda part: str(part)[:50])
def test_fields_that_are_not_supported_or_do_not_fit_the_target_are_named(
    save: Any, target: Decoder, draft_format: DraftFormat, fields: dict[str, Any], message: str
) -> None:
    assert message in refusal(save(draft_format, fields=fields), target)


@pytest.mark.parametrize(("draft_format", "file"), [("eagle", "model"), ("medusa", "medusa_lm_head")])
def test_a_folder_without_weights_is_refused(save: Any, target: Decoder, draft_format: DraftFormat, file: str) -> None:
    folder: Path = save(draft_format)
    next(folder.glob("*.safetensors")).unlink()
    message = refusal(folder, target)
    assert f"{file}.safetensors" in message
    assert "speculation.model" in message
