"""An engine that guesses draws from the target's own distribution, whatever becomes of guesses: chi-square tests with
seeds that requests bring and with those that a router draws for them. The 8,000 answers by default find what is grossly
wrong; the 200,000 of the slow tests find one percent, by the power that ``test_distribution.py`` names."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from agreeing_draft import save_first_layers
from msgspec.structs import replace as replace_field
from served_requests import Checkpoints
from token_tables import (
    NUM_NEW_TOKENS,
    PROMPT,
    SIGNIFICANCE,
    VOCAB_SIZE,
    p_values,
    p_values_if_moved,
    summed,
)
from ways_to_serve import CLUSTER, ENGINE, serve_cluster

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.clock import ManualClock
from eagleray.core.config import EngineConfig, ModelConfigSection, SpeculationConfig
from eagleray.core.messages import TokenLogprobs
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution import runner
from eagleray.engine.execution.executor import build_executor
from eagleray.engine.speculation import growth
from eagleray.engine.speculation.build import build_draft_policy
from eagleray.engine.speculation.tree import DraftTree
from eagleray.engine.speculation.verify import accepted_nodes
from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config
from eagleray.router import coordinator
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
NUM_OF_ENGINE, NUM_OFTEN, AT_ONCE = 8_000, 200_000, 20_000


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_random_checkpoint(folder, TINY, seed=1)
    return folder


Seeded = Callable[[RequestSpec], RequestSpec]  # what an engine gets, of what was asked


def own_seed(spec: RequestSpec) -> RequestSpec:
    return replace_field(spec, sampling=replace_field(spec.sampling, seed=int(spec.request_id)))


@dataclass(frozen=True)
class Drawn:
    """What an engine drew."""

    answers: list[list[int]]
    scores: list[TokenLogprobs]  # of their first tokens
    acceptance: Acceptance
    num_preemptions: int


def serve(
    model: Path,
    speculation: SpeculationConfig | None,
    prompts: Sequence[tuple[int, ...]],
    sampling: dict[str, Any],
    seeded: Seeded = own_seed,
    **settings: int,
) -> Drawn:
    sizes = {"num_blocks": 1024, "max_num_seqs": 256, "max_num_batched_tokens": 2048}  # whole trees are verified
    config = EngineConfig(**{"block_size_tokens": 8, "enable_prefix_caching": False} | sizes | settings)
    executor = build_executor(ModelConfigSection(path=str(model)), config, num_threads=1, speculation=speculation)
    policy, tokenizer = build_draft_policy(speculation, executor.has_draft_network), byte_tokenizer()
    engine = Engine(executor, config, ManualClock(), lambda spec: OutputText(tokenizer, spec.sampling, ()), policy)
    for index, prompt in enumerate(prompts):
        engine.add(seeded(new_spec(index, prompt, sampling)))
    answers: list[list[int]] = [[] for _ in prompts]
    first: dict[int, TokenLogprobs] = {}
    steps: list[Acceptance | None] = []
    while engine.has_work:
        outcome = engine.step()
        steps.append(outcome.acceptance)
        for output in outcome.outputs:
            answers[int(output.request_id)].extend(output.token_ids)
            if output.position == 0 and output.logprobs:
                first[int(output.request_id)] = output.logprobs[0]
    executor.close()
    acceptance = total_acceptance(steps) or Acceptance()
    return Drawn(answers, [first[index] for index in sorted(first)], acceptance, engine.scheduler.num_preemptions)


def new_spec(index: int, prompt: tuple[int, ...], sampling: dict[str, Any]) -> RequestSpec:
    params = SamplingParams(ignore_eos=True, **sampling)
    return RequestSpec(request_id=str(index), token_ids=prompt, num_prompt_tokens=len(prompt), sampling=params)


def engines_probabilities(model: Path) -> dict[tuple[int, ...], float]:
    """Of each answer, by what the target itself says after each of its beginnings."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NUM_NEW_TOKENS):
        prompts = [(*PROMPT, *beginning) for beginning in found]
        sampling = {"max_tokens": 1, "temperature": 0.0, "logprobs": VOCAB_SIZE}
        scores = serve(model, None, prompts, sampling).scores
        found = {
            (*beginning, token): probability * math.exp(logprob)
            for (beginning, probability), of_next in zip(found.items(), scores, strict=True)
            for token, logprob in zip(of_next.top_ids, of_next.top_logprobs, strict=True)
        }
    return found


EARLY_EXIT = {"method": "early_exit", "early_exit_layers": 1}
TREE = {"tree_branching": 2, "tree_nodes": 4}
REJECTION = {"verification": "rejection"}


def draw(
    model: Path,
    speculation: dict[str, Any],
    seeded: Seeded = own_seed,
    count: int = NUM_OF_ENGINE,
    num_tokens: int = NUM_NEW_TOKENS + 2,  # for the last ones less is guessed
    expect: Callable[[Drawn], bool] = lambda drawn: drawn.num_preemptions == 0,
    **settings: int,
) -> Counter[tuple[int, ...]]:
    """How often each answer came."""
    config = SpeculationConfig(num_speculative_tokens=2, adaptive=False, **speculation)
    drawn = serve(model, config, [PROMPT] * count, {"max_tokens": num_tokens}, seeded, **settings)
    assert 0.2 < drawn.acceptance.rate_per_position[0] < 0.95  # guesses are taken, and refused
    assert expect(drawn)
    return Counter(tuple(answer[:NUM_NEW_TOKENS]) for answer in drawn.answers)


def p_values_of_engine(
    model: Path, speculation: dict[str, Any], seeded: Seeded = own_seed, **settings: Any
) -> dict[str, float]:
    return p_values(draw(model, speculation, seeded, **settings), engines_probabilities(model))


@pytest.mark.parametrize("verification", ["target_token", "rejection"])
def test_answers_of_an_engine_have_the_targets_own_distribution(tiny_model: Path, verification: str) -> None:
    found = p_values_of_engine(tiny_model, {**EARLY_EXIT, "verification": verification})
    assert min(found.values()) > SIGNIFICANCE, found


@pytest.mark.parametrize("guessing", [TREE, REJECTION], ids=["trees", "rejection"])
def test_answers_to_requests_without_seeds_have_the_targets_own_distribution(
    tiny_model: Path, guessing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the seeds that the router draws for them."""
    monkeypatch.setattr(coordinator.secrets, "randbits", random.Random(8).getrandbits)
    found = p_values_of_engine(tiny_model, EARLY_EXIT | guessing, coordinator.with_seed)
    assert min(found.values()) > SIGNIFICANCE, found


def test_answers_have_it_where_a_head_knows_a_part_of_the_tokens_and_draws_from_its_best(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "_DRAWN_CANDIDATES", 3)
    save_random_draft(tmp_path, "eagle3", load_model_config(tiny_model), seed=2, draft_vocab_size=4)
    found = p_values_of_engine(tiny_model, {"method": "eagle3", "model": str(tmp_path), **REJECTION})
    assert min(found.values()) > SIGNIFICANCE, found


def walks_wrongly(tree: DraftTree, chosen: Sequence[int]) -> list[int]:
    return accepted_nodes(tree, chosen) or [0][: hash(tuple(chosen)) % 2]


def test_an_engine_that_walks_wrongly_is_found_out(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "accepted_nodes", walks_wrongly)
    found = p_values_of_engine(tiny_model, EARLY_EXIT, count=NUM_OF_ENGINE // 4)
    assert min(found.values()) < SIGNIFICANCE, found


@pytest.mark.parametrize("guessing", [TREE, REJECTION], ids=["trees", "rejection"])
def test_an_engine_that_walks_wrongly_is_found_out_by_requests_without_seeds(
    tiny_model: Path, guessing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator.secrets, "randbits", random.Random(8).getrandbits)
    monkeypatch.setattr(runner, "accepted_nodes", walks_wrongly)
    found = p_values_of_engine(tiny_model, EARLY_EXIT | guessing, coordinator.with_seed, count=NUM_OF_ENGINE // 4)
    assert min(found.values()) < SIGNIFICANCE, found


def test_an_engine_whose_requests_have_few_seeds_is_found_out(tiny_model: Path) -> None:
    def one_of_few(spec: RequestSpec) -> RequestSpec:
        return replace_field(spec, sampling=replace_field(spec.sampling, seed=int(spec.request_id) % 50))

    found = p_values_of_engine(tiny_model, EARLY_EXIT, one_of_few, count=NUM_OF_ENGINE // 4)
    assert min(found.values()) < SIGNIFICANCE, found


def test_a_router_that_draws_few_seeds_is_found_out(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = random.Random(8)
    monkeypatch.setattr(coordinator.secrets, "randbits", lambda num_bits: few.getrandbits(6))
    found = p_values_of_engine(tiny_model, EARLY_EXIT, coordinator.with_seed, count=NUM_OF_ENGINE // 4)
    assert min(found.values()) < SIGNIFICANCE, found


# ---- one percent


def draw_often(model: Path, guessing: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    """Answers to requests without seeds."""
    monkeypatch.setattr(coordinator.secrets, "randbits", random.Random(9).getrandbits)
    rounds = [
        draw(model, EARLY_EXIT | guessing, coordinator.with_seed, AT_ONCE, NUM_NEW_TOKENS + 1)
        for _ in range(NUM_OFTEN // AT_ONCE)
    ]
    return sum(rounds, Counter())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("guessing", [TREE, REJECTION], ids=["trees", "rejection"])
def test_many_answers_to_requests_without_seeds_have_the_targets_own_distribution(
    tiny_model: Path, guessing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, expected = draw_often(tiny_model, guessing, monkeypatch), engines_probabilities(tiny_model)
    found = p_values(answers, expected)
    assert min(found.values()) > SIGNIFICANCE, found
    for place in range(NUM_NEW_TOKENS):  # and had one percent moved from any token to any other, this would show it
        counts, cells = (summed(each, lambda answer, at=place: (answer[at],)) for each in (answers, expected))
        assert max(p_values_if_moved(0.01, counts, cells)) < SIGNIFICANCE


def after_first(probabilities: Mapping[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """Of a second token where the first one is there, by both."""
    pairs, first = (summed(probabilities, lambda answer, end=end: answer[:end]) for end in (2, 1))
    return {pair: probability / first[pair[:1]] for pair, probability in pairs.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_engine_that_follows_a_few_wrong_guesses_is_found_out_by_requests_without_seeds(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few that pairs of tokens shift by one percent: the second token then comes from p + share * (q - p)."""
    save_first_layers(tmp_path, tiny_model, EARLY_EXIT["early_exit_layers"])
    expected = engines_probabilities(tiny_model)
    p, q = (after_first(probabilities) for probabilities in (expected, engines_probabilities(tmp_path)))
    first = summed(expected, lambda answer: answer[:1])
    share = 0.01 / sum(first[pair[:1]] * max(0.0, p[pair] - q[pair]) for pair in p)
    chance = random.Random(7)

    def wrong_now_and_then(tree: DraftTree, chosen: Sequence[int]) -> list[int]:
        return [0] if chance.random() < share else accepted_nodes(tree, chosen)  # the first is the best guess

    monkeypatch.setattr(runner, "accepted_nodes", wrong_now_and_then)
    found = p_values(draw_often(tiny_model, TREE, monkeypatch), expected)
    assert found["first and second"] < SIGNIFICANCE, found


# Whoever goes on gets blocks of those who have just begun, and in between there is room for guesses.
TIGHT = {"block_size_tokens": 1, "num_blocks": 150, "max_num_seqs": 32, "watermark": 0.0}


def has_guessed_and_preempted(drawn: Drawn) -> bool:
    return min(drawn.num_preemptions, drawn.acceptance.num_draft_tokens) > NUM_OF_ENGINE // 20


@pytest.mark.parametrize("num_host_blocks", [0, 500], ids=["recompute", "swap"])
def test_answers_by_rejection_keep_the_targets_own_distribution_where_guesses_are_lost_to_preemption(
    tiny_model: Path, num_host_blocks: int
) -> None:
    settings = TIGHT | {"count": NUM_OF_ENGINE // 4, "num_tokens": 8, "num_host_blocks": num_host_blocks}
    found = p_values_of_engine(tiny_model, EARLY_EXIT | REJECTION, expect=has_guessed_and_preempted, **settings)
    assert min(found.values()) > SIGNIFICANCE, found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_answers_by_rejection_have_the_targets_own_distribution_when_they_are_handed_over(tiny_model: Path) -> None:
    """From a prefill worker, after the first token, to a decode worker. So many at once that a transfer may be late."""
    count = NUM_OF_ENGINE // 4
    pool = {"engine": ENGINE | {"num_blocks": 8 * count}}
    served = serve_cluster(
        Checkpoints(tiny_model, {}),
        EARLY_EXIT | REJECTION | {"num_speculative_tokens": 2, "adaptive": False},
        lambda trace: trace.moved_bytes > 0,
        requests=[own_seed(new_spec(index, PROMPT, {"max_tokens": NUM_NEW_TOKENS + 2})) for index in range(count)],
        prefill=pool,
        decode=pool,
        router=CLUSTER["router"] | {"local_prefill_tokens": 0},
    )
    assert served.records.num_first_steps > 0.9 * count and 0.2 < served.records.mean_accepted < 1.8
    answers = Counter(tuple(tokens[:NUM_NEW_TOKENS]) for tokens in served.tokens.values())
    found = p_values(answers, engines_probabilities(tiny_model))
    assert min(found.values()) > SIGNIFICANCE, found
