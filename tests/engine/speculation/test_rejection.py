"""The rule of rejection in an engine: what it leaves as it is, and what it refuses. Distributions have a test of their
own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eagleray.core.clock import ManualClock
from eagleray.core.config import EngineConfig, ModelConfigSection, SpeculationConfig, parse_config
from eagleray.core.errors import ConfigError
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution.executor import build_executor
from eagleray.engine.speculation.build import build_draft_policy
from eagleray.engine.speculation.rejection import keep_or_draw_anew
from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText

TOKENIZER = byte_tokenizer()
TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 61, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
SEEDED = [{"temperature": 0.8, "seed": 5, "top_p": 0.9, "presence_penalty": 0.5}, {"temperature": 1.0, "seed": 6}]
GREEDY = [{"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.3}]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_random_checkpoint(folder, TARGET, seed=1)
    return folder


@pytest.fixture(params=["eagle", "eagle3", "medusa", "draft_model", "early_exit", "ngram"])
def method(request: pytest.FixtureRequest, target: Path, tmp_path: Path) -> dict[str, Any]:
    if request.param == "ngram":
        return {"method": "ngram"}
    if request.param == "early_exit":
        return {"method": "early_exit", "early_exit_layers": 3}
    if request.param == "draft_model":
        (tmp_path / "draft").mkdir()
        save_random_checkpoint(tmp_path / "draft", TARGET | {"num_hidden_layers": 1}, seed=1)
    else:
        save_random_draft(tmp_path / "draft", request.param, load_model_config(target), seed=2)
    return {"method": request.param, "model": str(tmp_path / "draft")}


def answer(target: Path, speculation: dict[str, Any] | None) -> dict[str, list[int]]:
    config = EngineConfig(block_size_tokens=4, num_blocks=200)
    guesses = SpeculationConfig(**speculation) if speculation is not None else None
    executor = build_executor(ModelConfigSection(path=str(target)), config, num_threads=1, speculation=guesses)
    policy = build_draft_policy(guesses, executor.has_draft_network)
    engine = Engine(executor, config, ManualClock(), lambda spec: OutputText(TOKENIZER, spec.sampling, ()), policy)
    for index, sampling in enumerate((*GREEDY, *SEEDED)):
        prompt = tuple((7 * place * (index + 1)) % 61 for place in range(9))
        params = SamplingParams(max_tokens=24, ignore_eos=True, **sampling)
        engine.add(RequestSpec(request_id=str(index), token_ids=prompt, num_prompt_tokens=9, sampling=params))
    answers: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            answers.setdefault(output.request_id, []).extend(output.token_ids)
    engine.check_integrity()
    executor.close()
    return answers


def test_greedy_answers_are_exact_and_seeded_ones_the_same_again(target: Path, method: dict[str, Any]) -> None:
    by_rejection = method | {"verification": "rejection", "adaptive": False}
    plain, answers = answer(target, None), answer(target, by_rejection)
    assert [answers[index] for index in "01"] == [plain[index] for index in "01"]
    assert {len(answers[index]) for index in "0123"} == {24}
    assert answer(target, by_rejection) == answers


@pytest.mark.parametrize("tree", [{"tree_branching": 2}, {"tree_paths": [[0], [1]]}])
def test_it_is_refused_with_trees(tree: dict[str, Any]) -> None:
    speculation = {"method": "early_exit", "early_exit_layers": 1, "verification": "rejection", **tree}
    with pytest.raises(ConfigError, match=r"verification rejection is for chains.*target_token"):
        parse_config({"speculation": speculation})


def test_a_draft_that_is_the_target_is_always_kept() -> None:
    """Rounding may leave nothing that the target has more of: then there is nothing to draw anew."""
    probabilities = torch.randn(500, 7, dtype=torch.float64).softmax(-1)
    guessed = torch.multinomial(probabilities, 1)[:, 0]
    almost_one = torch.full((500,), 1.0 - 1e-16, dtype=torch.float64)
    kept = keep_or_draw_anew(probabilities, probabilities, guessed, almost_one, torch.zeros(500, 7))
    assert kept.tolist() == guessed.tolist()
