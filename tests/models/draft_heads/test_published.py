"""Heads that others published: their config.json and their tensors' names, types and shapes, without the weights.

What could not be confirmed is left out. Each head says who has seen it.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.draft_config import EagleConfig, MedusaConfig
from eagleray.models.draft_heads.eagle import EagleHead
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.read import DraftCheckpoint, read_draft
from eagleray.models.draft_heads.tensor_names import DRAFT_TO_TARGET
from eagleray.models.draft_heads.weight_names import eagle_views, medusa_views
from eagleray.models.model_config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

ELEMENT_BYTES = {"BF16": 2, "I64": 8, "BOOL": 1}

# What the heads are for: sizes of their config.json.
LLAMA_3_8B = ModelConfig(
    model_type="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    sliding_window=(None,) * 32,
)
VICUNA_7B = replace(
    LLAMA_3_8B, vocab_size=32_000, intermediate_size=11_008, num_kv_heads=32, max_position_embeddings=2048
)
QWEN3_32B = ModelConfig(
    model_type="qwen3",
    vocab_size=151_936,
    hidden_size=5120,
    intermediate_size=25_600,
    num_layers=64,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    sliding_window=(None,) * 64,
    qk_norm=True,
)

# yuhuili/EAGLE-LLaMA3-Instruct-8B. Configuration: SafeAILab/EAGLE, eagle/train/EAGLE-LLaMA3-Instruct-8B.json. Tensors:
# abyo-software/abyo-speculate, crates/speculate/src/methods/eagle.rs, which loads the published pytorch_model.bin
# (1.5 GB, float16).
EAGLE_LLAMA3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "bias": False,
}
EAGLE_LLAMA3_8B_TENSORS: Shapes = {
    "embed_tokens.weight": (128256, 4096),
    "fc.weight": (4096, 8192),
    "layers.0.self_attn.q_proj.weight": (4096, 4096),
    "layers.0.self_attn.k_proj.weight": (1024, 4096),
    "layers.0.self_attn.v_proj.weight": (1024, 4096),
    "layers.0.self_attn.o_proj.weight": (4096, 4096),
    "layers.0.mlp.gate_proj.weight": (14336, 4096),
    "layers.0.mlp.up_proj.weight": (14336, 4096),
    "layers.0.mlp.down_proj.weight": (4096, 14336),
    "layers.0.post_attention_layernorm.weight": (4096,),
}

# yuhuili/EAGLE3-LLaMA3.1-Instruct-8B. Configuration: what its authors train with, SafeAILab/EAGLE,
# eagle/traineagle3/config.json; it names neither rope_theta nor layers. Tensors: the 15 that
# abyo-software/abyo-speculate, crates/speculate/src/methods/eagle3.rs, finds in the published pytorch_model.bin
# (810 MB, float16).
EAGLE3_LLAMA31_8B: dict[str, Any] = {
    name: value for name, value in EAGLE_LLAMA3_8B.items() if name not in ("rope_theta", "bias")
} | {"draft_vocab_size": 32000}
EAGLE3_LLAMA31_8B_TENSORS: Shapes = {
    "fc.weight": (4096, 12288),
    "midlayer.input_layernorm.weight": (4096,),
    "midlayer.hidden_norm.weight": (4096,),
    "midlayer.self_attn.q_proj.weight": (4096, 8192),
    "midlayer.self_attn.k_proj.weight": (1024, 8192),
    "midlayer.self_attn.v_proj.weight": (1024, 8192),
    "midlayer.self_attn.o_proj.weight": (4096, 4096),
    "midlayer.post_attention_layernorm.weight": (4096,),
    "midlayer.mlp.gate_proj.weight": (14336, 4096),
    "midlayer.mlp.up_proj.weight": (14336, 4096),
    "midlayer.mlp.down_proj.weight": (4096, 14336),
    "norm.weight": (4096,),
    "lm_head.weight": (32000, 4096),
    "d2t": (32000,),
    "t2d": (128256,),
}

# RedHatAI/Qwen3-32B-speculator.eagle3 at dc84fe7f. Fields, tensors, types and the size of model.safetensors:
# bitworks-io/fast-mlx, experiments/eagle3 (preflight_core.py, inspect_checkpoint.py, test_preflight_core.py), which
# holds them to the published files. speculators_model_type, without which vLLM serves none of them: as the library
# writes it (vllm-project/speculators, pull request 53).
SPECULATORS_QWEN3_32B: dict[str, Any] = {
    "architectures": ["Eagle3Speculator"],
    "draft_vocab_size": 32000,
    "norm_before_residual": True,
    "speculators_config": {
        "algorithm": "eagle3",
        "proposal_methods": [{"speculative_tokens": 3}],
        "verifier": {"name_or_path": "Qwen/Qwen3-32B"},
    },
    "speculators_model_type": "eagle3",
    "transformer_layer_config": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "vocab_size": 151936,
        "attention_bias": False,
    },
}
SPECULATORS_QWEN3_32B_TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "d2t": ("I64", (32000,)),
    "embed_tokens.weight": ("BF16", (151936, 5120)),
    "fc.weight": ("BF16", (5120, 15360)),
    "layers.0.hidden_norm.weight": ("BF16", (5120,)),
    "layers.0.input_layernorm.weight": ("BF16", (5120,)),
    "layers.0.mlp.down_proj.weight": ("BF16", (5120, 25600)),
    "layers.0.mlp.gate_proj.weight": ("BF16", (25600, 5120)),
    "layers.0.mlp.up_proj.weight": ("BF16", (25600, 5120)),
    "layers.0.post_attention_layernorm.weight": ("BF16", (5120,)),
    "layers.0.self_attn.k_proj.weight": ("BF16", (1024, 10240)),
    "layers.0.self_attn.o_proj.weight": ("BF16", (5120, 8192)),
    "layers.0.self_attn.q_proj.weight": ("BF16", (8192, 10240)),
    "layers.0.self_attn.v_proj.weight": ("BF16", (1024, 10240)),
    "lm_head.weight": ("BF16", (32000, 5120)),
    "norm.weight": ("BF16", (5120,)),
    "t2d": ("BOOL", (151936,)),
}
SPECULATORS_QWEN3_32B_BYTES = 3_121_274_856

# FasterDecoding/medusa-vicuna-7b-v1.3. Its config.json names two heads: FasterDecoding/Medusa,
# medusa/model/medusa_model.py, which says so and takes five. The tensors, of five heads: InternLM/lmdeploy issue 1180,
# which lists their names in medusa-vicuna-13b-v1.3. Shapes follow from the model that they are for.
MEDUSA_VICUNA_7B: dict[str, Any] = {
    "medusa_num_heads": 2,
    "medusa_num_layers": 1,
    "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
}
MEDUSA_VICUNA_7B_TENSORS: Shapes = {
    name: shape
    for head in range(5)
    for name, shape in (
        (f"{head}.0.linear.weight", (4096, 4096)),
        (f"{head}.0.linear.bias", (4096,)),
        (f"{head}.1.weight", (32000, 4096)),
    )
}


def read_pickled(
    folder: Path, file: str, config: dict[str, Any], shapes: Shapes, target: ModelConfig
) -> DraftCheckpoint:
    """The whole shape of each tensor, over one element that is stored."""
    dtypes = {"d2t": torch.int64, "t2d": torch.bool}
    tensors = {
        name: torch.zeros(1, dtype=dtypes.get(name, torch.float16)).expand(shape) for name, shape in shapes.items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / file)
    assert (folder / file).stat().st_size < 100_000
    return read_draft(folder, target)


def needed(checkpoint: DraftCheckpoint, target: ModelConfig) -> Shapes:
    """Tensors that loading would ask for, by the names that ``read_draft`` gives them."""
    if isinstance(checkpoint.config, MedusaConfig):
        views = medusa_views(MedusaHeads(checkpoint.config, torch.float16, "meta"))
        return {name: tuple(view.shape) for name, view in views.items()}
    config = checkpoint.config
    assert isinstance(config, EagleConfig)
    views = eagle_views(EagleHead(config, Decoder(target, torch.float16, "meta")))
    tables = {DRAFT_TO_TARGET: (config.draft_vocab_size,)} if config.draft_vocab_size != target.vocab_size else {}
    return {name: tuple(view.shape) for name, view in views.items()} | tables


def stored(checkpoint: DraftCheckpoint) -> Shapes:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def test_eagle_for_llama_3_8b(tmp_path: Path) -> None:
    file, shapes = "pytorch_model.bin", EAGLE_LLAMA3_8B_TENSORS
    found = read_pickled(tmp_path, file, EAGLE_LLAMA3_8B, shapes, LLAMA_3_8B)
    config = found.config
    assert isinstance(config, EagleConfig) and found.method == "eagle"
    assert (config.layers.num_layers, config.layers.num_kv_heads, config.layers.rope.theta) == (1, 8, 500_000)
    assert config.draft_vocab_size == 128_256 and config.has_embedding and not config.fusion_bias
    assert found.tensors["fc.weight"].dtype == "float16"
    assert stored(found) == needed(found, LLAMA_3_8B) == shapes


def test_eagle3_for_llama_31_8b(tmp_path: Path) -> None:
    file, shapes = "pytorch_model.bin", EAGLE3_LLAMA31_8B_TENSORS
    found = read_pickled(tmp_path, file, EAGLE3_LLAMA31_8B, shapes, LLAMA_3_8B)
    config = found.config
    assert isinstance(config, EagleConfig) and found.method == "eagle3"
    assert (config.capture_layers, config.draft_vocab_size, config.layers.rope.theta) == ((2, 16, 29), 32_000, 10_000)
    assert config.has_lm_head and not config.has_embedding and not config.norm_before_residual
    assert stored(found) == needed(found, LLAMA_3_8B) and len(stored(found)) == len(shapes) - 1  # all but t2d


def test_a_speculators_head_for_qwen3_32b(tmp_path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    by_alignment = sorted(
        SPECULATORS_QWEN3_32B_TENSORS, key=lambda n: -ELEMENT_BYTES[SPECULATORS_QWEN3_32B_TENSORS[n][0]]
    )
    for name in by_alignment:
        dtype, shape = SPECULATORS_QWEN3_32B_TENSORS[name]
        begin, end = end, end + math.prod(shape) * ELEMENT_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    assert 8 + len(written) + end == SPECULATORS_QWEN3_32B_BYTES  # nothing is missing in the list, and nothing too much
    (tmp_path / "model.safetensors").write_bytes(len(written).to_bytes(8, "little") + written)
    (tmp_path / "config.json").write_text(json.dumps(SPECULATORS_QWEN3_32B))

    found = read_draft(tmp_path, QWEN3_32B)
    config = found.config
    assert isinstance(config, EagleConfig) and found.method == "eagle3"
    assert (config.capture_layers, config.draft_vocab_size) == ((2, 32, 61), 32_000)
    assert (config.layers.num_heads, config.layers.head_dim, config.layers.rope.theta) == (64, 128, 1_000_000)
    assert config.norm_before_residual and config.has_embedding and config.has_lm_head
    assert found.tensors["fc.weight"].dtype == "bfloat16"
    assert stored(found) == needed(found, QWEN3_32B)


@pytest.mark.parametrize("named", [2, 5])
def test_medusa_for_vicuna_7b_has_the_heads_of_its_file_however_many_its_configuration_names(
    tmp_path: Path, named: int
) -> None:
    fields, shapes = MEDUSA_VICUNA_7B | {"medusa_num_heads": named}, MEDUSA_VICUNA_7B_TENSORS
    found = read_pickled(tmp_path, "medusa_lm_head.pt", fields, shapes, VICUNA_7B)
    assert found.method == "medusa" and found.config == MedusaConfig(5, 1, 4096, 32_000)
    assert stored(found) == needed(found, VICUNA_7B) == shapes
