from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eagleray.core.errors import ConfigError
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.eagle import EagleHead
from eagleray.models.draft_heads.eagle_format import LAYER_IDS
from eagleray.models.draft_heads.export import export_eagle3, export_medusa
from eagleray.models.draft_heads.load import load_draft
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.weight_names import eagle_views, medusa_views


def values(views: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: view.tolist() for name, view in views.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 500.0, "rms_norm_eps": 1e-3, "head_dim": 6, "num_key_value_heads": 2},
        {"norm_before_residual": True, "norm_output": True, "fc_norm": True},
        {"norm_before_fc": True, "eagle_aux_hidden_state_layer_ids": [1, 6]},
        {"draft_vocab_size": 20},
    ],
    ids=str,
)
def test_an_exported_eagle3_head_is_loaded_as_it_was(
    save: Any, tmp_path: Path, target: Decoder, changes: dict[str, Any]
) -> None:
    head = load_draft(save("eagle3", **changes), target)
    assert isinstance(head, EagleHead)
    offsets = load_file(tmp_path / "model.safetensors")["d2t"]
    export_eagle3(tmp_path / "exported", head.config, eagle_views(head) | {"d2t": offsets})
    again = load_draft(tmp_path / "exported", target)
    assert isinstance(again, EagleHead)
    assert again.config == head.config
    assert values(eagle_views(again)) == values(eagle_views(head))
    drafts = torch.arange(head.config.draft_vocab_size)
    assert torch.equal(again.target_ids(drafts), head.target_ids(drafts))


def test_an_exported_eagle3_head_has_the_names_of_the_layout_and_the_mask_of_its_vocabulary(
    save: Any, tmp_path: Path, target: Decoder
) -> None:
    head = load_draft(save("eagle3"), target)
    assert isinstance(head, EagleHead)
    stored = load_file(tmp_path / "model.safetensors")
    export_eagle3(tmp_path / "exported", head.config, eagle_views(head) | {"d2t": stored["d2t"]})
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == stored.keys() | {"t2d"}
    config = json.loads((tmp_path / "exported" / "config.json").read_text("utf-8"))
    assert config["torch_dtype"] == "float32"  # of what is stored, whatever the target computes in
    assert exported["t2d"].nonzero().flatten().tolist() == head.target_ids(torch.arange(10)).tolist()


def test_the_layers_that_are_read_are_named_where_other_servers_look_for_them(
    save: Any, tmp_path: Path, target: Decoder
) -> None:
    """At the top by their input, as vLLM and speculators read them; in the section by their output, as SGLang does."""
    for layers, section in (([2, 4, 6], {LAYER_IDS: [1, 3, 5], "use_aux_hidden_state": True}), ([0, 4, 6], None)):
        head = load_draft(save("eagle3", eagle_aux_hidden_state_layer_ids=layers), target)
        assert isinstance(head, EagleHead)
        export_eagle3(tmp_path / "exported", head.config, eagle_views(head) | {"d2t": stored_offsets(tmp_path)})
        config = json.loads((tmp_path / "exported" / "config.json").read_text("utf-8"))
        assert (config[LAYER_IDS], config.get("eagle_config")) == (layers, section)
        again = load_draft(tmp_path / "exported", target)
        assert isinstance(again, EagleHead) and again.config == head.config


def stored_offsets(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["d2t"]


@pytest.mark.parametrize(
    ("draft_format", "changes", "extra"),
    [
        ("eagle", {}, "version 1 or 2"),
        ("speculators", {"transformer_layer_config": {"num_hidden_layers": 2}}, "several layers"),
        ("speculators", {"transformer_layer_config": {"model_type": "qwen3"}}, "head norms"),
        ("speculators", {"transformer_layer_config": {"attention_bias": True}}, "biases"),
        ("eagle3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling"),
    ],
    ids=str,
)
def test_what_the_layout_has_no_place_for_is_refused(
    save: Any, tmp_path: Path, target: Decoder, draft_format: Any, changes: dict[str, Any], extra: str
) -> None:
    head = load_draft(save(draft_format, **changes), target)
    assert isinstance(head, EagleHead)
    with pytest.raises(ConfigError, match=extra):
        export_eagle3(tmp_path / "exported", head.config, eagle_views(head))


def test_exported_medusa_heads_are_loaded_as_they_were(save: Any, tmp_path: Path, target: Decoder) -> None:
    heads = load_draft(save("medusa", medusa_num_heads=2, medusa_num_layers=2), target)
    assert isinstance(heads, MedusaHeads)
    export_medusa(tmp_path / "exported", heads.config, medusa_views(heads), "the-target")
    again = load_draft(tmp_path / "exported", target)
    assert isinstance(again, MedusaHeads)
    assert again.config == heads.config
    assert values(medusa_views(again)) == values(medusa_views(heads))


def test_exported_medusa_heads_name_themselves_and_their_biases(save: Any, tmp_path: Path, target: Decoder) -> None:
    """vLLM takes the biases of the blocks for missing unless it is told of them, and then leaves them out."""
    heads = load_draft(save("medusa"), target)
    assert isinstance(heads, MedusaHeads)
    export_medusa(tmp_path / "exported", heads.config, medusa_views(heads), "the-target")
    config = json.loads((tmp_path / "exported" / "config.json").read_text("utf-8"))
    assert (config["architectures"], config["model_type"]) == (["MedusaModel"], "medusa")
    assert config["medusa_fc_bias"] and any(name.endswith(".bias") for name in medusa_views(heads))
