"""``eagleray train-draft`` as a whole, with a small target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_targets import FAMILIES

from eagleray.cli.__main__ import main
from eagleray.core.acceptance import total_acceptance
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.llm import LLM
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.text.fake import save_byte_tokenizer
from eagleray.training import run
from eagleray.training import trainer as trainer_module
from eagleray.training.trainer import Trainer

TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip


METHODS = pytest.mark.parametrize("method", ["eagle3", "medusa"])
# ``tests/training/test_trainer.py`` trains for each of them; the command makes no difference between them.
FAMILY_OPTIONS = [
    pytest.param(changes, id=name, marks=[pytest.mark.slow] if number > 0 else [])
    for number, (name, changes) in enumerate(FAMILIES.items())
]


@pytest.fixture
def options(tmp_path: Path, request: pytest.FixtureRequest) -> list[str]:
    """Of a run of a few steps on ten prompts; its parameter is what ``config.json`` of the target has instead."""
    folder = tmp_path / "target"
    folder.mkdir()
    save_random_checkpoint(folder, TARGET | getattr(request, "param", {}), seed=1)
    save_byte_tokenizer(folder)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"number {number}"}) + "\n" for number in range(10)))
    words = f"--model {folder} --data {data} --output {tmp_path / 'head'} --max-tokens 24 --batch-tokens 64"
    return ["train-draft", *words.split(), "--epochs", "1", "--check-every-steps", "2", "--num-threads", "1"]


def served_tokens(folder: Path, speculation: dict[str, Any] | None = None, **settings: Any) -> list[int]:
    """An answer of the target; with ``speculation`` its guesses must have been verified."""
    llm = LLM(folder, num_threads=1, num_blocks=32, speculation=speculation, **settings)
    [spec] = llm._specs("number 3", SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), 0)
    llm.engine.add(spec)
    steps = []
    while llm.engine.has_work:
        steps.append(llm.engine.step())
    acceptance = total_acceptance(step.acceptance for step in steps)
    assert (acceptance is not None and acceptance.num_draft_tokens > 0) == (speculation is not None)
    return [token_id for step in steps for output in step.outputs for token_id in output.token_ids]


@METHODS
def test_a_head_is_trained_on_own_samples_and_served(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert main([*options, "--method", method]) == 0
    shown = capsys.readouterr().out
    assert "samples: 9 of 9 answered" in shown
    assert "loss" in shown and "tokens per step with 3 guesses" in shown
    speculation = {"method": method, "model": str(tmp_path / "head"), "adaptive": False}
    assert served_tokens(tmp_path / "target", speculation) == served_tokens(tmp_path / "target")


@METHODS
@pytest.mark.parametrize("options", FAMILY_OPTIONS, indirect=True)
def test_a_head_for_another_family_is_trained_and_served(options: list[str], tmp_path: Path, method: str) -> None:
    assert main([*options, "--method", method]) == 0
    speculation = {"method": method, "model": str(tmp_path / "head"), "adaptive": False}
    assert served_tokens(tmp_path / "target", speculation) == served_tokens(tmp_path / "target")


@METHODS
@pytest.mark.parametrize("options", [{"torch_dtype": "bfloat16"}], ids=str, indirect=True)
def test_a_head_for_a_bfloat16_target_is_trained_and_served_in_that_format(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert main([*options, "--method", method, "--dtype", "bfloat16"]) == 0
    assert f"--model {tmp_path / 'target'} --dtype bfloat16 --set" in capsys.readouterr().out
    speculation = {"method": method, "model": str(tmp_path / "head"), "adaptive": False}
    plain = served_tokens(tmp_path / "target", dtype="bfloat16")
    assert served_tokens(tmp_path / "target", speculation, dtype="bfloat16") == plain


@pytest.mark.parametrize("way_out", [["--method", "medusa"], ["--capture-layers", "0", "1"]], ids=" ".join)
@pytest.mark.parametrize("options", [{"num_hidden_layers": 2}], ids=str, indirect=True)
def test_a_target_with_too_few_layers_for_eagle3_is_refused_at_once_with_what_works(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], way_out: list[str]
) -> None:
    assert main(options) == 2
    shown = capsys.readouterr()
    assert "num_hidden_layers=2: EAGLE-3 reads three layers; train --method medusa" in shown.err
    assert "answered" not in shown.out  # which would have taken hours
    assert main([*options, *way_out]) == 0
    method = "medusa" if "medusa" in way_out else "eagle3"
    speculation = {"method": method, "model": str(tmp_path / "head"), "adaptive": False}
    assert served_tokens(tmp_path / "target", speculation) == served_tokens(tmp_path / "target")


def test_a_head_for_a_quantized_target_is_trained_and_gone_on_with_for_that_one_only(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--quantization", "w8a8"]) == 0
    assert "--quantization w8a8 --set speculation.method=eagle3" in capsys.readouterr().out
    assert main([*options, "--quantization", "w8a8", "--resume"]) == 0
    assert main([*options, "--resume"]) == 2
    assert "holds samples for other data or settings" in capsys.readouterr().err


def test_an_interrupted_run_says_when_this_machine_would_compute_otherwise(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "fastest_dtype", lambda: torch.bfloat16)
    assert main(options) == 0
    monkeypatch.setattr(trainer_module, "fastest_dtype", lambda: torch.float32)
    assert main([*options, "--resume"]) == 0
    assert "goes on in torch.bfloat16, as it began; on this machine torch.float32" in capsys.readouterr().out


def test_a_head_that_reads_other_layers_than_the_authors_says_so(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 0
    assert "it reads the inputs of layers 0, 1, 2, and says so as eagle_aux_hidden" in capsys.readouterr().out


def test_the_head_is_written_once_for_each_time_that_it_is_measured(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []

    def export_head(settings: run.RunSettings, trainer: Trainer) -> None:
        written.append(settings.output)

    monkeypatch.setattr(run, "export_head", export_head)
    assert main(options) == 0
    assert len(written) == capsys.readouterr().out.count("held out: accepted") > 1


def test_a_run_is_gone_on_with_only_when_asked_to(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 0
    assert main(options) == 2
    assert "holds a run; add --resume to go on" in capsys.readouterr().err
    assert main([*options, "--resume"]) == 0  # nothing is left to do
    assert main([*options, "--resume", "--epochs", "2"]) == 2
    assert "--resume: num_epochs=2" in capsys.readouterr().err


def test_a_run_that_was_interrupted_behind_its_last_step_has_a_head_when_it_is_gone_on_with(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "measure", interrupt)
        assert main([*options, "--check-every-steps", "1000"]) != 0
    head = tmp_path / "head" / "model.safetensors"
    assert not head.exists()
    assert main([*options, "--check-every-steps", "1000", "--resume"]) == 0
    assert head.exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["--method", "medusa"], "--resume: method='medusa': the checkpoint was made with 'eagle3'"),
        (["--num-guesses", "5"], "--resume: num_guesses=5: the checkpoint was made with 4"),
        (["--capture-layers", "0", "1"], "--resume: capture_layers=[0, 1]: the checkpoint was made with [0, 1, 2]"),
        (["--draft-vocab-size", "100"], "--resume: draft_vocab_size=100: the checkpoint was made with None"),
    ],
)
def test_another_head_is_not_resumed(
    options: list[str], capsys: pytest.CaptureFixture[str], changes: list[str], reason: str
) -> None:
    assert main(options) == 0
    assert main([*options, "--resume", *changes]) == 2
    assert reason in capsys.readouterr().err


def test_an_output_that_holds_something_else_is_left_alone(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = tmp_path / "head"
    head.write_text("mine")
    assert main(options) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    head.unlink()
    head.mkdir()
    (head / "model.safetensors").write_text("mine")
    assert main(options) == 2
    assert "holds files of something else; name another folder" in capsys.readouterr().err
    assert (head / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["--epochs", "0"], "--epochs=0: must be at least 1"),
        (["--draft-vocab-size", "1000"], "--draft-vocab-size=1000: the target's vocabulary has 259 tokens"),
        (["--capture-layers", "2", "1"], "--capture-layers=(2, 1): must rise and lie within 0 to 2"),
        (["--method", "medusa", "--draft-vocab-size", "100"], "Medusa's heads have the target's whole vocabulary"),
        (["--method", "medusa", "--capture-layers", "1"], "--capture-layers=(1,): Medusa reads the last layer alone"),
        (["--learning-rate", "0"], "--learning-rate=0.0: must be more than 0"),
        (["--temperatures", "0", "-1"], "temperature=-1.0: must be between"),
        (["--num-threads", "0"], "--num-threads=0: must be at least 1"),
        (["--max-tokens", "2"], "no prompt of 1 to 1 tokens is in it"),
        (["--quantization", "int5"], "model.quantization='int5': Input should be 'w8a8', 'int8' or 'int4'"),
        (["--no-self-generate"], "documents with answers are too few; give more data"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    options: list[str], capsys: pytest.CaptureFixture[str], changes: list[str], reason: str
) -> None:
    assert main([*options, *changes]) == 2
    assert reason in capsys.readouterr().err
