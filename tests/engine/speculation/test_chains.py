"""Guesses of a network: what a target chooses whose logits are those of the network that guesses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from eagleray.core.kv_layout import KVLayout
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.execution.kv_tensors import KVTensors
from eagleray.engine.execution.verified import VerifiedRun
from eagleray.engine.scheduling.plan import ScheduledRun
from eagleray.engine.speculation.decoders import DecoderNetwork
from eagleray.engine.speculation.growth import Level
from eagleray.engine.speculation.network import ChainGuesser, ChainStart, NetworkGuesser
from eagleray.kernels.native.build import NativeUnavailable
from eagleray.kernels.paged_attention.api import plan_attention
from eagleray.kernels.sampling.batch import RandomRows, SamplingBatch
from eagleray.kernels.select import KernelChoice, Kernels, select_kernels
from eagleray.models.decoder import Decoder
from eagleray.models.loader import load_model
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config

BLOCK_SIZE, NUM_BLOCKS, LENGTH = 4, 32, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 53, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
SAMPLING = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=4),
    SamplingParams(temperature=2, seed=5),
)


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    choice: KernelChoice = request.param
    try:
        return select_kernels(choice, torch.float32, "cpu", 1)
    except NativeUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def decoder(tmp_path: Path, kernels: Kernels) -> Decoder:
    save_random_checkpoint(tmp_path, CONFIG, seed=1)
    return load_model(tmp_path, load_model_config(tmp_path), torch.float32, "cpu", kernels=kernels)


def verified_runs(round_number: int) -> list[VerifiedRun]:
    """One request for each way to sample, at a position and in blocks of its own."""
    runs = []
    for index, sampling in enumerate(SAMPLING):
        known = tuple((7 * round_number + 5 * index + 3 * at) % 53 for at in range(6 + 2 * round_number + index))
        spec = RequestSpec(request_id=f"{index}", token_ids=known, num_prompt_tokens=3, sampling=sampling, choice=index)
        block_ids = [(8 * index + 3 * round_number + at) % 8 + 8 * index for at in range(8)]
        run = ScheduledRun(spec, known, 0, len(known), block_ids, samples=True, may_draft=True)
        runs.append(VerifiedRun(run, 0, (), (round_number,)))
    return runs


def compute(
    decoder: Decoder, kv: KVTensors, token_ids: Sequence[int], first: int, block_ids: Sequence[int]
) -> torch.Tensor:
    """Hidden state of the last of ``token_ids``, of which the first stands at position ``first``."""
    plan = plan_attention([0, len(token_ids)], [first], [block_ids], BLOCK_SIZE, "cpu")
    positions = torch.arange(first, first + len(token_ids))
    return decoder.forward(torch.tensor(token_ids), positions, kv.group("target"), plan)[-1:]


def forget_last_tokens(kv: KVTensors, runs: Sequence[VerifiedRun]) -> None:
    for run in runs:
        block, offset = divmod(run.num_known - 1, BLOCK_SIZE)
        kv.group("target")[run.run.block_ids[block], :, :, :, offset] = float("nan")


def token_after(decoder: Decoder, kernels: Kernels, hidden: torch.Tensor, spec: RequestSpec, position: int) -> int:
    """As the target chooses it."""
    numbers = [torch.tensor([number]) for number in (spec.sampling.seed or 0, spec.choice, position)]
    random = RandomRows(torch.tensor([0]), torch.tensor([float(spec.sampling.temperature)]), *numbers)
    batch = SamplingBatch(random=None if spec.sampling.is_greedy else random)
    return int(kernels.sample_tokens(decoder.compute_logits(hidden), batch))


@pytest.mark.parametrize("begins_with", ["hidden states", "tokens"])
@pytest.mark.parametrize("length", [1, LENGTH])
def test_a_chain_is_what_the_network_itself_would_answer(
    decoder: Decoder, kernels: Kernels, length: int, begins_with: str
) -> None:
    kv = KVTensors(KVLayout(BLOCK_SIZE, (decoder.layer_group("float32"),)), NUM_BLOCKS)
    guesser = ChainGuesser.of(DecoderNetwork(decoder, "target"), kernels)
    for round_number in range(4):  # from the third on, the step is replayed
        runs = verified_runs(round_number)
        hidden_BD = torch.cat(
            [compute(decoder, kv, run.token_ids(0, run.num_known), 0, run.run.block_ids) for run in runs]
        )
        if begins_with == "tokens":
            forget_last_tokens(kv, runs)
        start = ChainStart(hidden_BD if begins_with == "hidden states" else None)
        chains = guesser.guess(start, kv, runs, length)
        for run, chain, hidden in zip(runs, chains, hidden_BD.split(1), strict=True):
            assert chain.is_chain and len(chain) == length
            for position, guess in enumerate(chain.token_ids, start=run.num_known):
                assert guess == token_after(decoder, kernels, hidden, run.run.spec, position)
                hidden = compute(decoder, kv, [guess], position, run.run.block_ids)


def test_temperatures_may_be_whole_numbers(decoder: Decoder, kernels: Kernels) -> None:
    kv = KVTensors(KVLayout(BLOCK_SIZE, (decoder.layer_group("float32"),)), NUM_BLOCKS)
    guesser = ChainGuesser.of(DecoderNetwork(decoder, "target"), kernels)
    assert len(guesser.guess(ChainStart(torch.ones(1, 32)), kv, verified_runs(0)[2:], 1)) == 1


def test_guesses_with_chance_in_them_are_not_the_best_ones(decoder: Decoder, kernels: Kernels) -> None:
    """A check on the test above: noise does change what is guessed."""
    kv = KVTensors(KVLayout(BLOCK_SIZE, (decoder.layer_group("float32"),)), NUM_BLOCKS)
    guesser = ChainGuesser.of(DecoderNetwork(decoder, "target"), kernels)
    chains = guesser.guess(ChainStart(torch.ones(3, 32)), kv, verified_runs(0), 1)
    assert len({chain.token_ids for chain in chains}) > 1


def test_in_a_tree_wider_than_a_mask_each_guess_follows_its_own_ancestors(decoder: Decoder, kernels: Kernels) -> None:
    """Ten branches that nothing joins, seven guesses deep, are 70 nodes: EAGLE-2's tree at its widest."""
    num_branches, num_levels = 10, 7
    kv = KVTensors(KVLayout(BLOCK_SIZE, (decoder.layer_group("float32"),)), 128)
    runs = [
        msgspec.structs.replace(run.run, block_ids=[40 * index + at for at in range(40)])
        for index, run in enumerate(verified_runs(0))
    ]
    verified = [VerifiedRun(run, 0, (), (0,)) for run in runs]
    hidden = [compute(decoder, kv, run.token_ids(0, run.num_known), 0, run.run.block_ids) for run in verified]
    guesser = NetworkGuesser(DecoderNetwork(decoder, "target"), kv, verified, torch.cat(hidden))
    branches_RBL = torch.arange(3 * num_branches * num_levels).view(3, num_branches, num_levels) * 7 % 53
    for depth in range(1, num_levels + 1):
        parents = torch.arange(num_branches) if depth > 1 else torch.zeros(num_branches, dtype=torch.int64)
        level = Level(depth, branches_RBL[:, :, depth - 1], parents.expand(3, -1))
        logits_RBV = guesser.expand(level)
    for run, branches, logits in zip(verified, branches_RBL.tolist(), logits_RBV, strict=True):
        for branch, of_branch in zip(branches, logits, strict=True):
            alone = compute(decoder, kv, branch, run.num_known, run.run.block_ids)
            torch.testing.assert_close(of_branch, decoder.compute_logits(alone)[0], rtol=1e-4, atol=1e-4)
