"""Logits against Hugging Face transformers: every family and rope scaling, however the tokens are cut into steps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from eagleray.kernels.paged_attention.api import plan_attention
from eagleray.models.decoder import Decoder
from eagleray.models.loader import load_model
from eagleray.models.registry import load_model_config

BLOCK_SIZE_TOKENS = 4
SEQUENCE_LENGTHS = (41, 17, 5, 30)
TOLERANCE = 1e-4

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-gqa-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 12, "rms_norm_eps": 1e-3, "rope_theta": 500.0}),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama-llama3": ("llama", {"head_dim": 16, "rope_parameters": {**LLAMA3, "rope_theta": 1000.0}}),
    "llama-dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "mistral-window": ("mistral", {"sliding_window": 6}),
    "mistral-window-over-blocks": ("mistral", {"sliding_window": 13, "num_key_value_heads": 1}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-upper-layers-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 20.0}}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3-yarn-mscale": ("qwen3", {"head_dim": 16, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}}),
    "qwen3-yarn-whole": (
        "qwen3",
        {
            "head_dim": 16,
            "rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 4, "beta_slow": 0.5, "truncate": False},
        },
    ),
    "qwen3-layer-types": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@dataclass(frozen=True)
class Golden:
    """One checkpoint, loaded by us, with what transformers computes from it."""

    decoder: Decoder
    sequences: list[list[int]]
    logits: list[torch.Tensor]  # per sequence [len, V]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    model = reference_model(*CASES[request.param])
    folder = tmp_path_factory.mktemp("checkpoint")
    is_sharded = request.param.startswith("qwen")
    model.save_pretrained(folder, max_shard_size="20KB" if is_sharded else "1GB")
    assert len(list(folder.glob("*.safetensors"))) > 1 or not is_sharded
    sequences = random_sequences()
    decoder = load_model(folder, load_model_config(folder), torch.float32, "cpu")
    return Golden(decoder, sequences, reference_logits(model, sequences))


def reference_model(family: str, overrides: dict[str, Any]) -> transformers.PreTrainedModel:
    """A tiny random model in which every parameter matters: norms and biases are random too."""
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name
            parameter.copy_(1 + 0.3 * noise if is_norm else noise * (0.3 if noise.ndim == 2 else 0.2))
    return model


def reference_logits(model: transformers.PreTrainedModel, sequences: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([sequence])).logits[0].float() for sequence in sequences]


def random_sequences() -> list[list[int]]:
    randoms = random.Random(3)
    return [[randoms.randrange(SIZES["vocab_size"]) for _ in range(length)] for length in SEQUENCE_LENGTHS]


def serve(
    decoder: Decoder,
    sequences: list[list[int]],
    steps: Iterator[Sequence[int]],
    kv_dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Logits of every position, computed in steps of so many tokens per sequence (0: not in this step).

    Blocks are scattered over the pool, and what nobody wrote is NaN.
    """
    num_blocks = [-(-len(sequence) // BLOCK_SIZE_TOKENS) for sequence in sequences]
    ids = list(range(sum(num_blocks) + 3))
    random.Random(11).shuffle(ids)
    tables = [[ids.pop() for _ in range(count)] for count in num_blocks]
    group = decoder.layer_group("float32")
    shape = (sum(num_blocks) + 3, *group.block_shape(BLOCK_SIZE_TOKENS))
    kv = torch.full(shape, torch.nan, dtype=kv_dtype)
    done = [0] * len(sequences)
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for counts in steps:
        members = [b for b, count in enumerate(counts) if count]
        runs = [range(done[b], done[b] + counts[b]) for b in members]
        starts = [0]
        for run in runs:
            starts.append(starts[-1] + len(run))
        plan = plan_attention(
            starts, [run.start for run in runs], [tables[b] for b in members], BLOCK_SIZE_TOKENS, "cpu"
        )
        input_ids = torch.tensor([sequences[b][p] for b, run in zip(members, runs, strict=True) for p in run])
        hidden = decoder.forward(input_ids, torch.tensor([p for run in runs for p in run]), kv, plan)
        step_logits = decoder.compute_logits(hidden)
        for b, start, end in zip(members, starts, starts[1:], strict=False):
            logits[b].append(step_logits[start:end])
            done[b] += end - start
    assert done == [len(sequence) for sequence in sequences]
    return [torch.cat(pieces) for pieces in logits]


def chunks(size: int) -> Iterator[list[int]]:
    """All sequences side by side, each in chunks of ``size``."""
    for start in range(0, max(SEQUENCE_LENGTHS), size):
        yield [min(size, max(0, length - start)) for length in SEQUENCE_LENGTHS]


def mixed() -> Iterator[list[int]]:
    """Sequences in all states together: some in chunks of changing size, some token by token, some waiting."""
    randoms = random.Random(5)
    left = list(SEQUENCE_LENGTHS)
    while any(left):
        step = [min(rest, randoms.choice((0, 1, 1, 3, 9))) for rest in left]
        left = [rest - count for rest, count in zip(left, step, strict=True)]
        if any(step):
            yield step


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [64, 1, 3, 4, 10])
def test_logits_equal_transformers_in_chunks_of(golden: Golden, size: int) -> None:
    ours = serve(golden.decoder, golden.sequences, chunks(size))
    assert largest_difference(ours, golden.logits) < TOLERANCE


def test_logits_equal_transformers_when_prefill_and_decode_share_steps(golden: Golden) -> None:
    ours = serve(golden.decoder, golden.sequences, mixed())
    assert largest_difference(ours, golden.logits) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama-gqa-biases", "qwen3"])
def test_16_bit_rounding_errors_are_no_larger_than_those_of_transformers(
    case: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = reference_model(*CASES[case]).to(dtype)
    model.save_pretrained(folder)
    sequences = random_sequences()
    theirs = reference_logits(model, sequences)
    exact = reference_logits(model.float(), sequences)
    config = load_model_config(folder)
    assert getattr(torch, config.dtype) is dtype
    ours = serve(load_model(folder, config, dtype, "cpu"), sequences, mixed(), kv_dtype=dtype)
    assert largest_difference(ours, exact) < 1.5 * largest_difference(theirs, exact)
