"""Every method and shape on real kernels: the tokens are those of the model without guesses."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from ways_to_serve import even

from eagleray.core.block_hash import HashNamespace
from eagleray.core.clock import ManualClock
from eagleray.core.config import EngineConfig, ModelConfigSection, SpeculationConfig
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution.executor import build_executor
from eagleray.engine.execution.identity import compute_model_identity
from eagleray.engine.speculation.build import build_draft_policy
from eagleray.engine.speculation.controller import AdaptiveDrafts
from eagleray.engine.speculation.tree import DraftShape
from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText

VOCAB_SIZE = 61
TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip
TREE = {"tree_branching": 3, "tree_nodes": 7}
FIXED = {"tree_paths": [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]}
PUBLISHED = {"num_speculative_tokens": 8, "tree_branching": 10, "tree_nodes": 59}  # EAGLE-2's, of 70 guesses
NUM_TOKENS = 24
TOKENIZER = byte_tokenizer()

SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1.2, "seed": 6, "top_p": 0.8, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.9, "seed": 8, "presence_penalty": 0.5, "logit_bias": {3: 4.0, 7: -100.0}, "logprobs": 2},
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_random_checkpoint(folder, TARGET, seed=1)
    return folder


@pytest.fixture(scope="module")
def drafts(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("drafts")
    folders = {"eagle": root / "eagle", "eagle3": root / "eagle3", "medusa": root / "medusa"}
    for name, folder in folders.items():
        save_random_draft(folder, name, load_model_config(target), seed=2)  # type: ignore[arg-type]
    folders["draft_model"] = root / "model"
    folders["draft_model"].mkdir()
    save_random_checkpoint(folders["draft_model"], TARGET | {"num_hidden_layers": 1}, seed=1)
    return folders


def specs() -> list[RequestSpec]:
    return [
        RequestSpec(
            request_id=f"{index}",
            token_ids=tuple(
                (7 * position * (index + 1) + position // 9) % VOCAB_SIZE for position in range(9 + 7 * index)
            ),
            num_prompt_tokens=9 + 7 * index,
            sampling=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **sampling),
        )
        for index, sampling in enumerate(SAMPLING)
    ]


def answer(
    target: Path,
    speculation: dict[str, Any] | None,
    expect: Callable[[Engine], bool] = lambda engine: engine.scheduler.num_preemptions == 0,
    **engine_settings: Any,
) -> dict[str, Any]:
    """Tokens and log-probabilities of all requests, computed together."""
    config = EngineConfig(**{"block_size_tokens": 4, "num_blocks": 120, "max_num_batched_tokens": 64} | engine_settings)
    guesses = SpeculationConfig(**speculation) if speculation is not None else None
    executor = build_executor(ModelConfigSection(path=str(target)), config, num_threads=1, speculation=guesses)
    policy = build_draft_policy(guesses, executor.has_draft_network) if guesses is not None else None
    engine = Engine(
        executor, config, ManualClock(), lambda spec: OutputText(TOKENIZER, spec.sampling, spec.token_ids), policy
    )
    for spec in specs():
        engine.add(spec)
    answers: dict[str, Any] = defaultdict(list)
    for _ in range(2000):
        if not engine.has_work:
            break
        for output in engine.step().outputs:
            answers[output.request_id] += output.token_ids
            answers[f"{output.request_id} logprobs"] += [entry.top_ids for entry in output.logprobs or ()]
    engine.check_integrity()
    executor.close()
    assert engine.kv.pool.num_free == engine.kv.pool.num_blocks
    assert expect(engine)
    return dict(answers)


@pytest.fixture(scope="module")
def plain(target: Path) -> dict[str, Any]:
    return answer(target, None)


@pytest.mark.parametrize(
    "shape",
    [{}, {"num_speculative_tokens": 1}, TREE, FIXED, {"adaptive": True}, {"adaptive": True, **TREE}],
    ids=["chain", "one", "tree", "fixed", "controller", "controller, tree"],
)
@pytest.mark.parametrize("method", ["eagle", "eagle3", "medusa", "draft_model", "early_exit", "ngram"])
def test_tokens_are_those_without_guesses(
    target: Path, drafts: dict[str, Path], plain: dict[str, Any], method: str, shape: dict[str, Any]
) -> None:
    if method == "ngram" and shape.keys() & {"tree_branching", "tree_paths"}:
        pytest.skip("text look-up guesses chains")
    speculation = {"method": method, "adaptive": False} | shape
    if method in drafts:
        speculation["model"] = str(drafts[method])
    if method == "early_exit":
        speculation["early_exit_layers"] = 3
    assert answer(target, speculation) == plain


@pytest.mark.parametrize("shape", [{}, TREE], ids=["chain", "tree"])
def test_a_controller_begins_to_guess_and_gives_it_up_where_nothing_comes_true(
    target: Path, drafts: dict[str, Path], plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
) -> None:
    """A check on the test above: within a request there are steps with guesses and steps without."""
    chosen: list[DraftShape | None] = []
    choose = AdaptiveDrafts.choose

    def watched_choose(policy: AdaptiveDrafts, num_decoding: int, max_rows: int) -> DraftShape | None:
        chosen.append(choose(policy, num_decoding, max_rows))
        return chosen[-1]

    monkeypatch.setattr(AdaptiveDrafts, "choose", watched_choose)
    note_times = AdaptiveDrafts.note_times  # which hears the same on any machine
    monkeypatch.setattr(AdaptiveDrafts, "note_times", lambda policy, times: note_times(policy, even(times)))
    speculation = {"method": "eagle3", "model": str(drafts["eagle3"]), "adaptive": True} | shape
    assert answer(target, speculation) == plain
    changes = [is_guessing for is_guessing, _ in groupby(shape is not None for shape in chosen)]
    assert changes[:3] == [False, True, False]


PREEMPTED = {"num_blocks": 34, "expect": lambda engine: engine.scheduler.num_preemptions > 0}


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 5},
        {"enable_prefix_caching": False, **PREEMPTED},
        {"num_host_blocks": 60, **PREEMPTED},
        {"kernels": "torch"},
    ],
    ids=["small chunks", "recompute", "swap", "torch"],
)
def test_guesses_survive_chunks_and_preemption(
    target: Path, drafts: dict[str, Path], plain: dict[str, Any], settings: dict[str, Any]
) -> None:
    speculation = {"method": "eagle3", "model": str(drafts["eagle3"]), "adaptive": False} | TREE
    assert answer(target, speculation, **settings) == plain


@pytest.mark.parametrize("method", ["eagle3", "draft_model"])
def test_the_published_tree_is_served_though_it_is_wider_than_a_mask(
    target: Path, drafts: dict[str, Path], plain: dict[str, Any], method: str
) -> None:
    speculation = {"method": method, "model": str(drafts[method]), "adaptive": False} | PUBLISHED
    assert answer(target, speculation, num_blocks=400) == plain


def test_the_models_own_layers_guess_what_it_says_when_all_but_few_are_left_out(target: Path) -> None:
    """A check on the tests above: guesses do come true."""
    steps = {layers: _num_steps(target, layers) for layers in (1, 6)}
    assert steps[6] < NUM_TOKENS


def _num_steps(target: Path, num_layers: int) -> int:
    config = EngineConfig(block_size_tokens=4, num_blocks=120)
    guesses = SpeculationConfig(method="early_exit", early_exit_layers=num_layers, adaptive=False)
    executor = build_executor(ModelConfigSection(path=str(target)), config, num_threads=1, speculation=guesses)
    policy = build_draft_policy(guesses, executor.has_draft_network)
    engine = Engine(
        executor, config, ManualClock(), lambda spec: OutputText(TOKENIZER, spec.sampling, spec.token_ids), policy
    )
    engine.add(specs()[0])
    count = 0
    while engine.has_work:
        count += bool(engine.step().outputs)
    executor.close()
    return count


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda drafts: {"method": "eagle", "model": str(drafts["eagle3"])}, "eagle3"),
        (lambda drafts: {"method": "medusa", "model": str(drafts["medusa"]), "num_speculative_tokens": 9}, "heads"),
        (lambda drafts: {"method": "early_exit", "early_exit_layers": 7}, "7 layers"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused_by_name(
    target: Path, drafts: dict[str, Path], change: Callable[[dict[str, Path]], dict[str, Any]], words: str
) -> None:
    with pytest.raises(Exception, match=words):
        answer(target, change(drafts))


def test_blocks_that_a_draft_writes_into_have_its_content_and_revision_in_their_hashes(
    target: Path, drafts: dict[str, Path]
) -> None:
    eagle = SpeculationConfig(method="eagle", model=str(drafts["eagle"]))
    roots = {namespace_of(target, guesses).root() for guesses in (None, eagle, with_revision(eagle, "2"))}
    assert len(roots) == 3
    assert namespace_of(target, eagle) == replace(namespace_of(target, None), **of_draft(target, eagle))
    medusa, text = SpeculationConfig(method="medusa", model=str(drafts["medusa"])), SpeculationConfig(method="ngram")
    assert namespace_of(target, medusa) == namespace_of(target, text) == namespace_of(target, None)


def with_revision(guesses: SpeculationConfig, revision: str) -> SpeculationConfig:
    return guesses.model_copy(update={"revision": revision})


def of_draft(target: Path, guesses: SpeculationConfig) -> dict[str, str]:
    namespace = namespace_of(target, guesses)
    return {"kv_format": namespace.kv_format, "draft": compute_model_identity(guesses.folder)}


def namespace_of(target: Path, guesses: SpeculationConfig | None) -> HashNamespace:
    config = EngineConfig(block_size_tokens=4, num_blocks=8)
    executor = build_executor(ModelConfigSection(path=str(target)), config, num_threads=1, speculation=guesses)
    engine = Engine(executor, config, ManualClock(), lambda spec: OutputText(TOKENIZER, spec.sampling, spec.token_ids))
    executor.close()
    return engine.namespace


def test_configuration_of_speculation_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="needs speculation"):
        SpeculationConfig(method="eagle3")
    with pytest.raises(ValueError, match="takes no speculation"):
        SpeculationConfig(method="ngram", model="x")
    assert json.loads(SpeculationConfig(method="ngram").model_dump_json())["num_speculative_tokens"] == 3
