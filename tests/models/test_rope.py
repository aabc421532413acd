"""Frequencies against transformers, with the settings of published models; tests/golden has the rotation itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagleray.models.families.fields import Fields
from eagleray.models.families.rope import read_rope
from eagleray.models.rope import RotaryEmbedding, inverse_frequencies

PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (4096, {"rope_type": "default", "rope_theta": 10000.0}),
    "linear-4": (4096, {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "llama-3.1": (
        131072,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    ),
    "qwen-yarn-4": (
        131072,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1000000.0},
    ),
    "yarn-mscale": (
        163840,
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_angles_equal_transformers_up_to_the_last_position(name: str) -> None:
    max_position_embeddings, parameters = PUBLISHED[name]
    reference = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=256,
            num_attention_heads=2,
            max_position_embeddings=max_position_embeddings,
            rope_parameters=dict(parameters),
        )
    )
    config = read_rope(Fields({"rope_parameters": parameters}), max_position_embeddings)
    torch.testing.assert_close(inverse_frequencies(config, 128), reference.inv_freq, rtol=2e-7, atol=0)
    positions = torch.tensor([0, 1, 1000, max_position_embeddings - 1])
    cos, sin = RotaryEmbedding(config, 128, "cpu").angles(positions, torch.float32)
    expected_cos, expected_sin = reference(torch.empty(0), positions[None])
    # An angle near 1e5 radians is known to about 0.008 in float32, and one bit of a frequency may differ.
    torch.testing.assert_close(cos, expected_cos[0], rtol=0, atol=0.02)
    torch.testing.assert_close(sin, expected_sin[0], rtol=0, atol=0.02)
