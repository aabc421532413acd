"""EAGLE and Medusa heads against their equations, written down once more: dense, in float64, one sequence at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import silu, softmax

from eagleray.kernels.native.build import NativeUnavailable
from eagleray.kernels.paged_attention.api import plan_attention
from eagleray.kernels.select import TORCH_KERNELS, Kernels, select_kernels
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.eagle import EagleHead
from eagleray.models.draft_heads.load import load_draft
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.random_draft import DraftFormat, save_random_draft
from eagleray.models.model_config import ModelConfig
from eagleray.models.random_weights import random_model

BLOCK_SIZE_TOKENS = 4
SEQUENCE_LENGTHS = (23, 9, 1, 14)
NUM_DRAFTS = 3
TOLERANCE = 1e-4

TARGET = ModelConfig(
    model_type="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    sliding_window=(None,) * 3,
)
QWEN3 = {"transformer_layer_config": {"model_type": "qwen3", "head_dim": 16}}
CASES: dict[str, tuple[DraftFormat, dict[str, Any]]] = {
    "eagle": ("eagle", {}),
    "eagle-bias-unless-denied": ("eagle", {"bias": None}),
    "eagle-two-layers-mha": ("eagle", {"num_hidden_layers": 2, "num_key_value_heads": 4}),
    "eagle-rope-theta": ("eagle", {"rope_theta": 500.0}),
    "eagle3": ("eagle3", {}),
    "eagle3-whole-vocabulary": ("eagle3", {"draft_vocab_size": 61}),
    "eagle3-two-streams-mqa": ("eagle3", {"eagle_aux_hidden_state_layer_ids": [1, 2], "num_key_value_heads": 1}),
    "eagle3-head-dim": ("eagle3", {"head_dim": 12, "rms_norm_eps": 1e-3}),
    "eagle3-streams-by-output": ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}}),
    "speculators": ("speculators", {}),
    "speculators-norm-before-residual": ("speculators", {"norm_before_residual": True}),
    "speculators-norm-before-fc": ("speculators", {"norm_before_fc": True}),
    "speculators-fc-norm": ("speculators", {"fc_norm": True}),
    "speculators-norm-output": ("speculators", {"norm_output": True}),
    "speculators-narrower": (
        "speculators",
        {"transformer_layer_config": {"hidden_size": 24}, "target_hidden_size": 32},
    ),
    "speculators-qwen3": ("speculators", QWEN3),
    "speculators-qwen3-three-layers": (
        "speculators",
        {
            "transformer_layer_config": {**QWEN3["transformer_layer_config"], "num_hidden_layers": 3},
            "norm_output": True,
        },
    ),
    "speculators-biases": ("speculators", {"transformer_layer_config": {"attention_bias": True, "mlp_bias": True}}),
}


class DenseEagle:
    """The equations of the papers and of the published code, from the tensors of a checkpoint."""

    def __init__(self, folder: Path, target: Decoder) -> None:
        fields = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.w = {name.replace("midlayer", "layers.0"): tensor for name, tensor in tensors.items()}
        self.w = {name: w.double() if w.is_floating_point() else w for name, w in self.w.items()}
        self.embedding = self.w.get("embed_tokens.weight", target.embedding.double())
        self.head = self.w.get("lm_head.weight", target.lm_head.weight.double())
        self.options, self.sizes = fields, fields.get("transformer_layer_config", fields)
        self.is_eagle3 = "layers.0.hidden_norm.weight" in self.w

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.w[f"{name}.weight"].T
        return product + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else product

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        rms = (x.square().mean(-1, keepdim=True) + self.sizes.get("rms_norm_eps", 1e-6)).sqrt()
        return x / rms * self.w[f"{name}.weight"]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[H, S, D] turned in the complex plane."""
        half = x.shape[-1] // 2
        theta = self.sizes.get("rope_theta", 10_000.0)
        angles = positions[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    def attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        prefix = f"layers.{layer}.self_attn"
        length, head_dim = len(x), self.sizes["head_dim"]
        positions = torch.arange(length) - 1.0
        heads = {
            kind: self.linear(f"{prefix}.{kind}_proj", x).view(length, -1, head_dim).transpose(0, 1) for kind in "qkv"
        }
        for kind in "qk":
            if f"{prefix}.{kind}_norm.weight" in self.w:
                heads[kind] = self.norm(f"{prefix}.{kind}_norm", heads[kind])
            heads[kind] = self.rotate(heads[kind], positions)
        group = len(heads["q"]) // len(heads["k"])
        key, value = (heads[kind].repeat_interleave(group, dim=0) for kind in "kv")
        scores = heads["q"] @ key.transpose(1, 2) / head_dim**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        return self.linear(f"{prefix}.o_proj", (softmax(scores, -1) @ value).transpose(0, 1).reshape(length, -1))

    def mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        prefix = f"layers.{layer}.mlp"
        gated = silu(self.linear(f"{prefix}.gate_proj", x)) * self.linear(f"{prefix}.up_proj", x)
        return self.linear(f"{prefix}.down_proj", gated)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        if not self.is_eagle3:
            return features
        if self.options.get("norm_before_fc"):
            features = self.norm("input_norm", features)
        if self.options.get("fc_norm"):
            streams = features.split(TARGET.hidden_size, dim=-1)
            features = torch.cat([self.norm(f"fc_norm.{i}", stream) for i, stream in enumerate(streams)], dim=-1)
        return self.linear("fc", features)

    def hidden(self, tokens: Sequence[int], features: torch.Tensor) -> torch.Tensor:
        """Token i beside the projected feature of token i - 1; ``features[0]`` is that of nothing."""
        embedded = self.embedding[list(tokens)]
        if self.is_eagle3:
            normed = self.norm("layers.0.hidden_norm", features)
            x = normed if self.options.get("norm_before_residual") else features
            pair = torch.cat((self.norm("layers.0.input_layernorm", embedded), normed), dim=-1)
            x = x + self.attention(0, pair)
        else:
            x = self.linear("fc", torch.cat((embedded, features), dim=-1))
            x = x + self.attention(0, x)
        x = x + self.mlp(0, self.norm("layers.0.post_attention_layernorm", x))
        for layer in range(1, self.sizes["num_hidden_layers"]):
            x = x + self.attention(layer, self.norm(f"layers.{layer}.input_layernorm", x))
            x = x + self.mlp(layer, self.norm(f"layers.{layer}.post_attention_layernorm", x))
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return (self.norm("norm", hidden) if self.is_eagle3 else hidden) @ self.head.T

    def next_feature(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm("norm", hidden) if self.options.get("norm_output") else hidden

    def target_id(self, draft_id: int) -> int:
        return draft_id + int(self.w["d2t"][draft_id]) if "d2t" in self.w else draft_id


@dataclass(frozen=True)
class Golden:
    """One head, loaded by us, what it is to read, and what the dense one makes of it."""

    target: Decoder
    folder: Path
    dense: DenseEagle
    sequences: list[list[int]]
    features: list[torch.Tensor]  # [S, feature_size], row i: of token i
    logits: list[torch.Tensor]  # teacher-forced, of every position

    def load(self, kernels: Kernels) -> EagleHead:
        head = load_draft(self.folder, self.target, kernels)
        assert isinstance(head, EagleHead)
        return head


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    draft_format, changes = CASES[request.param]
    folder = tmp_path_factory.mktemp("draft")
    save_random_draft(folder, draft_format, TARGET, seed=5, **changes)
    target = random_model(TARGET, seed=3)
    dense, head = DenseEagle(folder, target), load_draft(folder, target)
    assert isinstance(head, EagleHead)
    randoms = random.Random(2)
    sequences = [[randoms.randrange(TARGET.vocab_size) for _ in range(length)] for length in SEQUENCE_LENGTHS]
    features = [target_features(target, sequence, head.config.capture_layers) for sequence in sequences]
    logits = [
        dense.logits(dense.hidden(tokens, shifted(dense.project(rows.double()))))
        for tokens, rows in zip(sequences, features, strict=True)
    ]
    return Golden(target, folder, dense, sequences, features, logits)


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if request.param == "torch":
        return TORCH_KERNELS
    try:
        return select_kernels("native", torch.float32, "cpu", 1)
    except NativeUnavailable as error:
        pytest.skip(str(error))


def shifted(rows: torch.Tensor) -> torch.Tensor:
    """Each row where the next one was; nothing comes before the first."""
    return torch.cat((torch.zeros_like(rows[:1]), rows[:-1]))


def target_features(target: Decoder, sequence: list[int], capture_layers: tuple[int, ...]) -> torch.Tensor:
    shape = target.layer_group("float32").block_shape(len(sequence))
    plan = plan_attention([0, len(sequence)], [0], [[0]], len(sequence), "cpu")
    tokens, positions = torch.tensor(sequence), torch.arange(len(sequence))
    return target.forward_with_features(tokens, positions, torch.zeros(1, *shape), plan, capture_layers)[1]


class Serving:
    """A head with a pool of its own: blocks scattered, and NaN where nobody wrote."""

    def __init__(self, head: EagleHead, max_lengths: Sequence[int]) -> None:
        self.head = head
        counts = [-(-length // BLOCK_SIZE_TOKENS) for length in max_lengths]
        ids = list(range(sum(counts) + 3))
        random.Random(11).shuffle(ids)
        self.tables = [[ids.pop() for _ in range(count)] for count in counts]
        shape = head.layer_group("float32").block_shape(BLOCK_SIZE_TOKENS)
        self.kv = torch.full((sum(counts) + 3, *shape), torch.nan)

    def run(self, runs: dict[int, range], tokens: torch.Tensor, features: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states of one step, per sequence, for these positions of each."""
        starts = [0, *accumulate(map(len, runs.values()))]
        tables = [self.tables[b] for b in runs]
        plan = plan_attention(starts, [run.start for run in runs.values()], tables, BLOCK_SIZE_TOKENS, "cpu")
        positions = torch.tensor([position for run in runs.values() for position in run])
        hidden = self.head.forward(tokens, features, positions, self.kv, plan)
        return [] if hidden is None else list(hidden.split(list(map(len, runs.values()))))

    def run_chunk(self, golden: Golden, runs: dict[int, range]) -> list[torch.Tensor]:
        """The same, teacher-forced."""
        tokens = torch.tensor([golden.sequences[b][position] for b, run in runs.items() for position in run])
        features = torch.stack([golden.features[b][position - 1] for b, run in runs.items() for position in run])
        is_first = torch.tensor([position == 0 for run in runs.values() for position in run])
        return self.run(runs, tokens, self.head.project(features).masked_fill(is_first[:, None], 0))


def chunked(size: int) -> Iterator[dict[int, range]]:
    for start in range(0, max(SEQUENCE_LENGTHS), size):
        ends = {b: min(start + size, length) for b, length in enumerate(SEQUENCE_LENGTHS)}
        yield {b: range(start, end) for b, end in ends.items() if end > start}


@pytest.mark.parametrize("size", [64, 1, 3, 4])
def test_teacher_forced_logits_equal_the_equations_in_chunks_of(golden: Golden, kernels: Kernels, size: int) -> None:
    serving = Serving(golden.load(kernels), SEQUENCE_LENGTHS)
    hidden: list[list[torch.Tensor]] = [[] for _ in SEQUENCE_LENGTHS]
    for runs in chunked(size):
        for b, rows in zip(runs, serving.run_chunk(golden, runs), strict=True):
            hidden[b].append(rows)
    for rows, expected in zip(hidden, golden.logits, strict=True):
        torch.testing.assert_close(
            serving.head.compute_logits(torch.cat(rows)).double(), expected, atol=TOLERANCE, rtol=0
        )


def test_writing_alone_leaves_the_bits_that_computing_everything_leaves(golden: Golden, kernels: Kernels) -> None:
    computed, written = (Serving(golden.load(kernels), SEQUENCE_LENGTHS) for _ in range(2))
    written.head.forward = written.head.write  # type: ignore[method-assign, assignment]
    for runs in chunked(3):
        computed.run_chunk(golden, runs)
        written.run_chunk(golden, runs)
    assert not computed.kv.isnan().all()
    assert torch.equal(computed.kv.nan_to_num(7e5), written.kv.nan_to_num(7e5))


def test_drafting_from_its_own_features_equals_the_equations(golden: Golden, kernels: Kernels) -> None:
    head = golden.load(kernels)
    serving = Serving(head, [length + NUM_DRAFTS for length in SEQUENCE_LENGTHS])
    hidden = serving.run_chunk(golden, {b: range(length) for b, length in enumerate(SEQUENCE_LENGTHS)})
    last = torch.stack([rows[-1] for rows in hidden])
    tokens = [list(sequence) for sequence in golden.sequences]
    features = [shifted(golden.dense.project(rows.double())) for rows in golden.features]
    for step in range(NUM_DRAFTS):
        logits = head.compute_logits(last)
        drafts = head.target_ids(logits.argmax(-1))
        for b, draft in enumerate(drafts.tolist()):
            expected = golden.dense.hidden(tokens[b], features[b])[-1:]
            torch.testing.assert_close(logits[b].double(), golden.dense.logits(expected)[0], atol=TOLERANCE, rtol=0)
            assert draft == golden.dense.target_id(int(logits[b].argmax()))
            tokens[b].append(draft)
            features[b] = torch.cat((features[b], golden.dense.next_feature(expected)))
        runs = {b: range(length + step, length + step + 1) for b, length in enumerate(SEQUENCE_LENGTHS)}
        last = torch.cat(serving.run(runs, drafts, head.next_feature(last)))


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_medusa_logits_equal_the_equations(tmp_path: Path, kernels: Kernels, num_layers: int) -> None:
    save_random_draft(tmp_path, "medusa", TARGET, seed=5, medusa_num_layers=num_layers)
    heads = load_draft(tmp_path, random_model(TARGET, seed=3), kernels)
    assert isinstance(heads, MedusaHeads)
    hidden = torch.randn(7, TARGET.hidden_size, generator=torch.Generator().manual_seed(1))
    w = {name: tensor.double() for name, tensor in load_file(tmp_path / "medusa_lm_head.safetensors").items()}
    logits = heads.forward(hidden)
    assert logits.shape == (7, 3, TARGET.vocab_size)
    for h in range(3):
        x = hidden.double()
        for block in range(num_layers):
            x = x + silu(x @ w[f"{h}.{block}.linear.weight"].T + w[f"{h}.{block}.linear.bias"])
        expected = x @ w[f"{h}.{num_layers}.weight"].T
        torch.testing.assert_close(logits[:, h].double(), expected, atol=TOLERANCE, rtol=0)
