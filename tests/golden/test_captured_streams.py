"""What draft heads read of the target, against the hidden states that Hugging Face transformers hands out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from eagleray.kernels.paged_attention.api import plan_attention
from eagleray.models.loader import load_model
from eagleray.models.registry import load_model_config

TOKENS = torch.tensor([7, 30, 2, 2, 19, 44, 8, 51, 23, 5, 11])


@pytest.mark.parametrize("layers", [(2, 3, 4), (0,), (1, 6), ()], ids=str)
def test_captured_streams_are_the_hidden_states_entering_those_layers(tmp_path: Path, layers: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        states = model(TOKENS[None], output_hidden_states=True).hidden_states  # the last one after the final norm
    decoder = load_model(tmp_path, load_model_config(tmp_path), torch.float32, "cpu")
    kv = torch.zeros(3, *decoder.layer_group("float32").block_shape(4))
    pieces = []
    for start, end in ((0, 6), (6, 7), (7, 11)):
        plan = plan_attention([0, end - start], [start], [[2, 0, 1]], 4, "cpu")
        chunk = TOKENS[start:end]
        pieces.append(decoder.forward_with_features(chunk, torch.arange(start, end), kv, plan, layers))
    hidden, features = (torch.cat(rows) for rows in zip(*pieces, strict=True))
    expected = torch.cat([states[layer][0] for layer in layers or (-1,)], dim=-1)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden, states[-1][0], atol=1e-4, rtol=1e-4)
