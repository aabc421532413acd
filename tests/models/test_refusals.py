"""A config.json is translated exactly or refused with the field, its value and a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eagleray.core.errors import ConfigError
from eagleray.models.model_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)
from eagleray.models.registry import load_model_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read_fields(fields: dict[str, Any], **changes: Any) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(fields | changes))
        return load_model_config(tmp_path)

    return read_fields


REFUSED: list[tuple[dict[str, Any], str, Any]] = [
    (LLAMA, "model_type", "gpt_oss"),
    (LLAMA, "model_type", None),
    (LLAMA, "model_type", ["llama"]),
    (LLAMA, "architectures", ["LlamaForSequenceClassification"]),
    (LLAMA, "quantization_config", {"quant_method": "gptq", "bits": 4}),
    (LLAMA, "compression_config", {"format": "pack-quantized"}),
    (LLAMA, "hidden_act", "gelu"),
    (LLAMA, "num_local_experts", 8),
    (LLAMA, "num_experts", 64),
    (LLAMA, "partial_rotary_factor", 0.5),
    (LLAMA, "final_logit_softcapping", 30.0),
    (LLAMA, "rope_interleaved", True),
    (LLAMA, "sliding_window", 128),
    (LLAMA, "layer_types", ["sliding_attention"] * 3),
    (LLAMA, "num_key_value_heads", 3),
    (LLAMA, "num_key_value_heads", 0),
    (LLAMA, "num_attention_heads", "4"),
    (LLAMA, "vocab_size", None),
    (LLAMA, "hidden_size", 18),
    (LLAMA, "head_dim", 7),
    (LLAMA, "rms_norm_eps", "small"),
    (LLAMA, "tie_word_embeddings", "yes"),
    (LLAMA, "torch_dtype", "float8_e4m3fn"),
    (LLAMA, "eos_token_id", "</s>"),
    (LLAMA, "rope_scaling", [2.0]),
    (MISTRAL, "layer_types", ["full_attention", "sliding_attention", "full_attention"]),
    (MISTRAL, "sliding_window", -1),
    (QWEN2, "layer_types", ["full_attention"]),
    (QWEN2, "layer_types", ["full_attention", "linear_attention", "full_attention"]),
    (QWEN2, "layer_types", ["sliding_attention"] * 3),
    (QWEN2, "use_sliding_window", 1),
]


@pytest.mark.parametrize(("fields", "name", "value"), REFUSED, ids=lambda part: str(part)[:40])
def test_is_refused_by_name_and_value(read: Any, fields: dict[str, Any], name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        read(fields, **{name: value})
    assert error.value.field == f"config.json: {name}"
    assert error.value.value == value
    assert error.value.way_out


@pytest.mark.parametrize(
    ("scaling", "name"),
    [
        ({"rope_type": "longrope", "factor": 4}, "rope_type"),
        ({"type": "mrope"}, "type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "dynamic", "factor": 2, "alpha": 1000}, "alpha"),
        ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}, "high_freq_factor"),
        ({"rope_type": "yarn", "factor": 4, "truncate": "no"}, "truncate"),
        ({"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
    ],
    ids=str,
)
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_rope_is_refused_by_name(read: Any, section: str, scaling: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(LLAMA, **{section: scaling})
    assert error.value.field == f"config.json: {section}.{name}"


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_an_unreadable_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json|JSON object"):
        load_model_config(tmp_path)


def test_missing_fields_take_the_defaults_of_transformers(read: Any) -> None:
    config = read(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (4, 4, 2048)
    assert (config.rope, config.rms_norm_eps, config.dtype) == (RopeConfig(10_000.0), 1e-6, "float32")
    assert not (config.tie_word_embeddings or config.qkv_bias or config.output_bias or config.mlp_bias)
    assert read(MISTRAL).sliding_window == (4096,) * 3
    assert read(QWEN2).qkv_bias and not read(QWEN2).output_bias
    assert read(QWEN2, model_type="qwen3", architectures=["Qwen3ForCausalLM"]).head_dim == 128


def test_fields_without_effect_are_accepted(read: Any) -> None:
    harmless = {"attention_dropout": 0.1, "pretraining_tp": 4, "use_cache": False, "quantization_config": None}
    assert read(LLAMA, **harmless) == read(LLAMA)


def test_windows_are_read_per_layer(read: Any) -> None:
    assert read(MISTRAL, sliding_window=None).sliding_window == (None,) * 3
    assert read(QWEN2, sliding_window=9, max_window_layers=1).sliding_window == (None,) * 3
    window = {"use_sliding_window": True, "sliding_window": 9}
    assert read(QWEN2, **window, max_window_layers=1).sliding_window == (None, 9, 9)
    assert read(QWEN2, **window, max_window_layers=0).sliding_window == (9, 9, 9)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert read(QWEN2, **window, layer_types=kinds).sliding_window == (9, None, None)


def test_rope_is_read_from_old_and_new_fields(read: Any) -> None:
    old = read(LLAMA, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = read(LLAMA, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert old.rope == new.rope == RopeConfig(5e5, LinearScaling(2.0))
    assert read(LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 3.0}).rope == RopeConfig(3.0)


def test_the_original_length_of_a_scaling_is_found_wherever_it_stands(read: Any) -> None:
    within = read(LLAMA, rope_scaling=LLAMA3 | {"original_max_position_embeddings": 99})
    beside = read(LLAMA, rope_scaling=LLAMA3, original_max_position_embeddings=99)
    nowhere = read(LLAMA, rope_scaling=LLAMA3)
    assert within.rope.scaling == beside.rope.scaling == Llama3Scaling(8, 1, 4, 99)
    assert nowhere.rope.scaling == Llama3Scaling(8, 1, 4, 2048)


def test_yarn_defaults_follow_the_paper(read: Any) -> None:
    scaling = read(LLAMA, rope_scaling={"rope_type": "yarn", "factor": 4.0}).rope.scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.attention_factor == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    assert (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32, 1, True)


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        (None, 64),
        (LLAMA3 | {"original_max_position_embeddings": 16}, 64),
        ({"type": "linear", "factor": 2.0}, 128),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),
        ({"type": "dynamic", "factor": 2.0}, 64),
    ],
)
def test_no_more_tokens_are_served_than_the_position_embedding_is_made_for(read: Any, scaling: Any, limit: int) -> None:
    config = read(LLAMA, max_position_embeddings=64, rope_scaling=scaling)
    assert config.max_model_tokens == config.resolve_max_model_tokens(None) == limit
    assert config.resolve_max_model_tokens(limit) == limit
    with pytest.raises(ConfigError, match=rf"model.max_model_tokens={limit + 1}: this model serves up to {limit}"):
        config.resolve_max_model_tokens(limit + 1)


def test_dynamic_scaling_is_served_within_the_original_length(read: Any) -> None:
    config = read(LLAMA, max_position_embeddings=64, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert config.rope.scaling == DynamicScaling(2.0, 64)
    with pytest.raises(ConfigError, match="dynamic rope scaling would change keys already cached"):
        config.resolve_max_model_tokens(65)


def test_the_generation_config_decides_where_a_text_ends(read: Any, tmp_path: Path) -> None:
    assert read(LLAMA, eos_token_id=5, bos_token_id=1).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert read(LLAMA, eos_token_id=5).eos_token_ids == (6, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    assert read(LLAMA, eos_token_id=5).eos_token_ids == (5,)
