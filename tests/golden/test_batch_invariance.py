"""With the native kernels a float32 model computes the same bits for a token however its sequence was served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from eagleray.kernels.native.build import NativeUnavailable
from eagleray.kernels.paged_attention.plan import plan_attention
from eagleray.kernels.select import select_kernels
from eagleray.models.decoder import Decoder
from eagleray.models.loader import load_model
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config

BLOCK_SIZE_TOKENS = 8
LENGTHS = (30, 9, 150, 64)
CONFIG: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 40, "attention_bias": True},
}


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_random_checkpoint(tmp_path, {**CONFIG, **FAMILIES[request.param]}, seed=3)
    return tmp_path


def load(checkpoint: Path, num_threads: int) -> Decoder:
    try:
        kernels = select_kernels("native", torch.float32, "cpu", num_threads)
    except NativeUnavailable as error:
        pytest.skip(str(error))
    return load_model(checkpoint, load_model_config(checkpoint), torch.float32, "cpu", kernels=kernels)


class Served:
    """Sequences that are computed step by step; collects the logits of every token."""

    def __init__(self, model: Decoder) -> None:
        config, generator = model.config, torch.Generator().manual_seed(1)
        self.model = model
        self.token_ids = [torch.randint(config.vocab_size, (length,), generator=generator) for length in LENGTHS]
        per_sequence = -(-max(LENGTHS) // BLOCK_SIZE_TOKENS)
        self.tables = [list(range(b * per_sequence, (b + 1) * per_sequence)) for b in range(len(LENGTHS))]
        shape = (len(LENGTHS) * per_sequence, config.num_layers, 2, config.num_kv_heads)
        self.pool = torch.full((*shape, BLOCK_SIZE_TOKENS, config.head_dim), torch.nan)
        self.computed = [0] * len(LENGTHS)
        self.logits: list[list[torch.Tensor]] = [[] for _ in LENGTHS]

    def step(self, counts: dict[int, int]) -> None:
        """Compute the next ``counts[b]`` tokens of sequence b, all in one batch."""
        starts = [0]
        for count in counts.values():
            starts.append(starts[-1] + count)
        prefixes = [self.computed[b] for b in counts]
        plan = plan_attention(starts, prefixes, [self.tables[b] for b in counts], BLOCK_SIZE_TOKENS, "cpu")
        positions = torch.cat([torch.arange(self.computed[b], self.computed[b] + n) for b, n in counts.items()])
        ids = torch.cat([self.token_ids[b][self.computed[b] : self.computed[b] + n] for b, n in counts.items()])
        logits = self.model.compute_logits(self.model.forward(ids, positions, self.pool, plan))
        for (b, count), rows in zip(counts.items(), logits.split(list(counts.values())), strict=True):
            self.logits[b].append(rows)
            self.computed[b] += count

    def serve(self, max_chunk_tokens: Sequence[int], max_batch: int) -> list[torch.Tensor]:
        """Everything, in chunks of the given sizes by turns, ``max_batch`` sequences in a step."""
        turn = 0
        while unfinished := [b for b, length in enumerate(LENGTHS) if self.computed[b] < length]:
            counts = {}
            for b in unfinished[:max_batch]:
                counts[b] = min(max_chunk_tokens[turn % len(max_chunk_tokens)], LENGTHS[b] - self.computed[b])
                turn += 1
            self.step(counts)
        return [torch.cat(rows) for rows in self.logits]


def test_a_token_gets_the_same_logits_bit_for_bit_however_it_was_served(checkpoint: Path) -> None:
    model = load(checkpoint, num_threads=1)
    alone = Served(model).serve([1000], max_batch=1)
    for max_chunk_tokens, max_batch in (([1000], 4), ([1], 4), ([1, 17, 5, 64], 3), ([13], 1)):
        for b, logits in enumerate(Served(model).serve(max_chunk_tokens, max_batch)):
            assert torch.equal(logits, alone[b]), (max_chunk_tokens, max_batch, b)


def test_the_number_of_threads_changes_no_logit(checkpoint: Path) -> None:
    one, two = (Served(load(checkpoint, count)).serve([40, 1], max_batch=4) for count in (1, 2))
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
