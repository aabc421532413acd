"""What vLLM makes of a head of ours: the program around it, with a stand-in for vLLM and with vLLM itself."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import draft_in_vllm
import pytest
import torch
from draft_acceptance import read_questions
from draft_in_vllm import Answered, PeerError, ask_vllm, main

from eagleray import LLM, SamplingParams
from eagleray.core.acceptance import Acceptance
from eagleray.core.config import DEMO_DRAFT_PATH, DEMO_MODEL_PATH
from eagleray.models.draft_heads.draft_config import MedusaConfig
from eagleray.models.draft_heads.export import export_medusa
from eagleray.models.draft_heads.medusa import MedusaHeads
from eagleray.models.draft_heads.weight_names import medusa_views
from eagleray.models.registry import load_model_config

NUM_CHATS = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=128)

STAND_IN = """
from types import SimpleNamespace as Of

__version__ = "0"
print("what an engine prints is no answer")

class LLM:
    def __init__(self, model, speculative_config, **settings):
        if speculative_config and speculative_config["model"] == "broken":
            raise ValueError("no such head")
        self.speculative_config = speculative_config

    def generate(self, prompts, params, use_tqdm):
        ids = [prompt["prompt_token_ids"][: params["max_tokens"]] for prompt in prompts]
        return [Of(outputs=[Of(token_ids=tuple(each))]) for each in ids]

    def get_metrics(self):
        prefix = "vllm:spec_decode_num_"
        counts = {"drafts": 4, "draft_tokens": 8, "accepted_tokens": 5} if self.speculative_config else {}
        counted = [Of(name=prefix + name, value=value) for name, value in counts.items()]
        vectors = [Of(name=prefix + "accepted_tokens_per_pos", values=[3, 2])] if counts else []
        return [*counted, *vectors, Of(name="vllm:time_to_first_token_seconds", buckets={})]

SamplingParams = dict
"""


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Write a function `close(self)`."}]}) + "\n")
    return path


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python whose vLLM repeats the prompt."""
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Path(sys.executable)


@pytest.fixture
def vllm_python() -> Path:
    """Of an environment with vLLM."""
    if "VLLM_PYTHON" not in os.environ:
        pytest.skip("VLLM_PYTHON names no Python of an environment with vLLM; benchmarks/results/README.md makes one")
    return Path(os.environ["VLLM_PYTHON"])


def options(python: Path) -> Any:
    return draft_in_vllm._parser().parse_args(["chats.jsonl", "--vllm-python", str(python)])


def test_answers_and_counts_come_from_the_peers_own_python(stand_in: Path, tmp_path: Path) -> None:
    speculation = {"method": "eagle3", "model": "head", "num_speculative_tokens": 2}
    plain = ask_vllm(options(stand_in), tmp_path, [[5, 6, 7], [8]], None)
    guessing = ask_vllm(options(stand_in), tmp_path, [[5, 6, 7], [8]], speculation)
    assert plain == Answered("vllm 0", False, [[5, 6, 7], [8]], Acceptance())
    assert guessing.answers == plain.answers and guessing.guesses
    assert (guessing.acceptance.num_steps, guessing.acceptance.num_accepted_tokens) == (4, 5)
    assert guessing.acceptance.rate_per_position == (3 / 4, 2 / 4)


def test_a_peer_that_does_not_load_the_head_says_why(stand_in: Path, tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="ValueError: no such head"):
        ask_vllm(options(stand_in), tmp_path, [[5]], {"method": "eagle3", "model": "broken"})


def test_a_python_that_is_not_there_is_named(tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(chats), "--vllm-python", str(tmp_path / "python")]) == 1
    assert f"--vllm-python {tmp_path / 'python'}: No such file" in capsys.readouterr().err


def test_both_engines_are_shown_beside_vllm_without_guesses(
    stand_in: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    words = ("--vllm-python", str(stand_in), "--max-tokens", "16", "--markdown", "--json", str(result))
    assert main([str(chats), *words]) == 0
    shown = capsys.readouterr().out
    assert "| vllm 0 | no | 16 | 1 of 1 | - | 1.00 | - |" in shown
    assert "| vllm 0 | yes | 16 | 1 of 1 | 4 | 3.75 | 0.75 0.50 |" in shown  # 15 tokens after the first
    assert "| eagleray | yes | 16 | 0 of 1 |" in shown
    report = json.loads(result.read_bytes())
    assert (report["method"], report["num_guesses"], report["num_prompts"]) == ("eagle3", 3, 1)


def save_medusa(folder: Path, chats: Path) -> None:
    """Heads that guess the commonest token of the answers. Without the biases of their blocks they often would not."""
    outputs = LLM("demo", num_threads=1, num_blocks=4096).chat(read_questions(chats, NUM_CHATS), GREEDY)
    [(token_id, _)] = Counter(id_ for output in outputs for id_ in output.outputs[0].token_ids).most_common(1)
    target = load_model_config(DEMO_MODEL_PATH)
    config = MedusaConfig(3, 1, target.hidden_size, target.vocab_size)
    views = medusa_views(MedusaHeads(config, torch.float32))
    for name, view in views.items():
        view.fill_(100.0 if name.endswith(".bias") else 0.0)
        if name.endswith(f".{config.num_layers}.weight"):
            view[token_id] = 1.0  # the sum of what the block puts out, which the bias makes larger than 0
    export_medusa(folder, config, views, "demo")


@pytest.mark.clients
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["eagle3", "medusa"])
def test_vllm_loads_an_exported_head_and_accepts_as_many_guesses_as_we_do(
    vllm_python: Path, tmp_path: Path, method: str
) -> None:
    chats = Path(draft_in_vllm.__file__).parent / "prompts" / "demo_held_out.jsonl"
    draft, result = DEMO_DRAFT_PATH, tmp_path / "result.json"
    if method == "medusa":
        draft = tmp_path / "medusa"
        save_medusa(draft, chats)
    words = ("--vllm-python", str(vllm_python), "--draft", str(draft), "--json", str(result))
    assert main([str(chats), *words, "--num-chats", str(NUM_CHATS)]) == 0
    report = json.loads(result.read_bytes())
    plain, theirs, ours = report["rows"]
    assert report["method"] == method
    assert plain["num_same_answers"] == theirs["num_same_answers"] == ours["num_same_answers"] == NUM_CHATS
    assert theirs["tokens_per_step"] == pytest.approx(ours["tokens_per_step"], rel=0.015)
    assert ours["tokens_per_step"] > (2.5 if method == "eagle3" else 1.05)
