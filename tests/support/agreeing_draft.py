"""A target with random weights, and drafts that mostly say what it says: for tests that need guesses to come true.

After token x the target mostly says token x + ``STRIDE``, and so do its drafts. What came before has its say in all of
them too, or nobody would miss it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.draft_heads.tensor_names import DRAFT_TO_TARGET, LM_HEAD
from eagleray.models.model_config import ModelConfig
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config

AgreeingDraft = Literal["eagle", "eagle3", "medusa", "draft_model"]

STRIDE: Final = 5
_EMBEDDING: Final = "model.embed_tokens.weight"
_FINAL_NORM: Final = "model.norm.weight"
_CERTAINTY: Final = 1.1  # other words than the likeliest come now and then
_WEIGHTS: Final = "model.safetensors"
_MEDUSA_WEIGHTS: Final = "medusa_lm_head.safetensors"


def save_agreeable_target(folder: Path, config: Mapping[str, Any], seed: int, say_of_context: float = 0.3) -> None:
    """A checkpoint of ``config``, a Llama's with an output layer of its own. At twice the usual ``say_of_context``
    greedy answers, too, change with what came before the last token."""
    folder.mkdir(parents=True, exist_ok=True)
    save_random_checkpoint(folder, config, seed)
    of_layers = dict.fromkeys(("o_proj", "down_proj"), say_of_context)
    tensors = _scaled(folder / _WEIGHTS, {_EMBEDDING: 4.0, **of_layers})
    tensors[LM_HEAD] = _output_rows(tensors, num_tokens_ahead=1)
    _save(tensors, folder / _WEIGHTS)


def save_agreeing_draft(folder: Path, method: AgreeingDraft, target: Path, seed: int) -> None:
    """A draft for what ``save_agreeable_target`` wrote to ``target``."""
    config = load_model_config(target)
    if method == "draft_model":
        save_first_layers(folder, target, config.num_layers - 2)
        return
    make = {"eagle": _save_eagle, "eagle3": _save_eagle3, "medusa": _save_medusa}[method]
    make(folder, config, load_file(target / _WEIGHTS), seed)


def save_first_layers(folder: Path, target: Path, num_layers: int) -> None:
    """The target without the layers behind these, as a model of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((target / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}), encoding="utf-8")
    left_out = tuple(f"model.layers.{layer}." for layer in range(num_layers, config["num_hidden_layers"]))
    tensors = load_file(target / _WEIGHTS)
    _save({name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}, folder / _WEIGHTS)


def _output_rows(target: Mapping[str, Tensor], num_tokens_ahead: int) -> Tensor:
    """Of a layer that reads the target's hidden state of a token and says which one comes so many behind it."""
    embedding = target[_EMBEDDING]
    rows = normalize(embedding, dim=-1) * _CERTAINTY
    return rows.roll(STRIDE * num_tokens_ahead, dims=0)


def _save_eagle(folder: Path, config: ModelConfig, target: Mapping[str, Tensor], seed: int) -> None:
    save_random_draft(folder, "eagle", config, seed)
    tensors = _scaled(folder / _WEIGHTS, {"o_proj": 0.1, "down_proj": 0.1})
    width = config.hidden_size
    tensors["embed_tokens.weight"] = target[_EMBEDDING].float()
    tensors["fc.weight"][:, :width] = torch.eye(width) / tensors["embed_tokens.weight"].square().mean().sqrt()
    tensors["fc.weight"][:, width:] *= 0.2
    _save(tensors, folder / _WEIGHTS)


def _save_eagle3(folder: Path, config: ModelConfig, target: Mapping[str, Tensor], seed: int) -> None:
    """The token reaches the residual stream by attention alone: keys are queries, so that each pair attends mostly to
    itself, and values are tokens."""
    width = config.hidden_size
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": width}
    save_random_draft(
        folder, "eagle3", config, seed, norm_before_residual=True, draft_vocab_size=config.vocab_size, **one_head
    )
    tensors = _scaled(folder / _WEIGHTS, {"down_proj": 0.1, "hidden_norm": 0.2, "_proj": 0.1})
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"midlayer.self_attn.{name}.weight"][:, :width] += torch.eye(width)
    tensors["midlayer.self_attn.o_proj.weight"] += torch.eye(width)
    tensors["norm.weight"] = target[_FINAL_NORM].float()
    tensors[LM_HEAD] = target[LM_HEAD].float()
    tensors[DRAFT_TO_TARGET] = torch.zeros(config.vocab_size, dtype=torch.int64)
    _save(tensors, folder / _WEIGHTS)


def _save_medusa(folder: Path, config: ModelConfig, target: Mapping[str, Tensor], seed: int) -> None:
    num_heads = 4
    save_random_draft(folder, "medusa", config, seed, medusa_num_heads=num_heads)
    tensors = _scaled(folder / _MEDUSA_WEIGHTS, {".0.linear": 0.1})
    for head in range(num_heads):
        tensors[f"{head}.1.weight"] = _output_rows(target, num_tokens_ahead=2 + head).float()
    _save(tensors, folder / _MEDUSA_WEIGHTS)


def _scaled(path: Path, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors of a file, times the factor of the part of their name that is found first."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        factor = next((factor for part, factor in factors.items() if part in name), None)
        if factor is not None:
            tensor *= factor
    return tensors


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
