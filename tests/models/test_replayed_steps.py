"""A decoder whose steps are replayed, beside one that computes each anew."""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eagleray.kernels.linear.quantization import Quantization
from eagleray.kernels.native.build import NativeUnavailable
from eagleray.kernels.paged_attention.api import AttentionPlan, TreeRun, plan_attention, tree_run
from eagleray.kernels.replay.api import ComputeAnew
from eagleray.kernels.select import Kernels, select_kernels
from eagleray.models.decoder import Decoder
from eagleray.models.loader import load_model
from eagleray.models.model_config import ModelConfig
from eagleray.models.norm import RMSNorm
from eagleray.models.random_weights import random_model
from eagleray.models.weight_names import checkpoint_views

NUM_BLOCKS, BLOCK_SIZE = 32, 4
CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    sliding_window=(None, 8, None),
    qkv_bias=True,
    qk_norm=True,
)
TREE = tree_run([-1, 0, 0, 2])


class Twin:
    """One decoder with a pool of its own."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        self.decoder = decoder
        group = decoder.layer_group(str(dtype).removeprefix("torch."))
        shape = (NUM_BLOCKS, group.num_layers, 2, group.num_kv_heads, BLOCK_SIZE, group.head_dim)
        self.pool = torch.zeros(shape, dtype=dtype)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor, AttentionPlan]) -> list[torch.Tensor]:
        """All that a decoder can be asked for; what the early exit leaves in the pool is then written over."""
        ids, positions, plan = batch
        early = self.decoder.forward(ids, positions, self.pool, plan, num_layers=2)
        captured = self.decoder.forward_with_features(ids, positions, self.pool, plan, (0, 2))
        return [early, *captured, self.decoder.forward(ids, positions, self.pool, plan), self.pool]


def decoder_with(folder: Path, kernels: Kernels, dtype: torch.dtype) -> Decoder:
    views = checkpoint_views(random_model(CONFIG, seed=1))
    save_file({name: view.clone() for name, view in views.items()}, folder / "model.safetensors")
    return load_model(folder, CONFIG, dtype, "cpu", kernels=kernels)


def random_batch(seed: int, trees: bool) -> tuple[torch.Tensor, torch.Tensor, AttentionPlan]:
    """Two sequences of one token, and one of four; equal shapes, and nothing else, for every seed."""
    generator = random.Random(seed)
    prefixes, counts = [generator.randrange(1, 20) for _ in range(3)], [1, 1, 4]
    ids = generator.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = [ids[0:8], ids[8:16], ids[16:24]]
    last: TreeRun | None = TREE if trees else None
    depths = list(TREE.depths) if trees else [0, 1, 2, 3]
    positions = [prefixes[0], prefixes[1], *(prefixes[2] + depth for depth in depths)]
    starts = list(accumulate(counts, initial=0))
    plan = plan_attention(starts, prefixes, tables, BLOCK_SIZE, "cpu", [None, None, last])
    return torch.randint(64, (6,), generator=torch.Generator().manual_seed(seed)), torch.tensor(positions), plan


@pytest.mark.parametrize(
    ("dtype", "quantization"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "w8a8")]
)
@pytest.mark.parametrize("trees", [False, True])
def test_replayed_steps_have_the_bits_of_those_computed_anew(
    tmp_path: Path, dtype: torch.dtype, quantization: Quantization | None, trees: bool
) -> None:
    try:
        kernels = select_kernels("native", dtype, "cpu", 2, quantization=quantization)
    except NativeUnavailable as error:
        pytest.skip(str(error))
    replaying = Twin(decoder_with(tmp_path, kernels, dtype), dtype)
    computing = Twin(decoder_with(tmp_path, replace(kernels, new_replayer=ComputeAnew), dtype), dtype)
    for seed in range(5):
        batch = random_batch(seed, trees)
        for replayed, computed in zip(replaying.step(batch), computing.step(batch), strict=True):
            assert torch.equal(replayed, computed)


@dataclass(frozen=True)
class NormsStreams:
    """Implements ``Companion``: has weights of its own."""

    norm: RMSNorm
    capture_layers: tuple[int, ...] = (1,)
    inputs: tuple[torch.Tensor, ...] = ()

    @property
    def identity(self) -> Hashable:
        return self.norm

    def compute(self, streams: torch.Tensor) -> torch.Tensor:
        return self.norm(streams)


def test_companions_of_one_type_each_compute_with_their_own_weights(tmp_path: Path) -> None:
    try:
        kernels = select_kernels("native", torch.float32, "cpu", 1)
    except NativeUnavailable as error:
        pytest.skip(str(error))
    twin = Twin(decoder_with(tmp_path, kernels, torch.float32), torch.float32)
    norms = [RMSNorm(CONFIG.hidden_size, 1e-6, kernels, dtype=torch.float32, device="cpu") for _ in range(2)]
    for factor, norm in enumerate(norms, start=1):
        norm.weight.fill_(factor)
    for seed in range(4):
        ids, positions, plan = random_batch(seed, trees=False)
        steps = [twin.decoder.forward_with(ids, positions, twin.pool, plan, NormsStreams(norm)) for norm in norms]
        (_, once), (_, twice) = steps
        assert torch.equal(twice, 2 * once)
