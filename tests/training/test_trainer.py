"""The loop: it learns, it can be interrupted at any moment, and what it says of a head is what serving it gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from small_targets import FAMILIES, ROPE_SCALED

from eagleray.core.config import ModelConfigSection
from eagleray.core.errors import ConfigError
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.llm import LLM
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.text.fake import save_byte_tokenizer
from eagleray.training import checkpoint
from eagleray.training import trainer as trainer_module
from eagleray.training.run import Documents, RunSettings, build_trainer, export_head, layers_note, load_target
from eagleray.training.texts import Document
from eagleray.training.trainer import Trainer, learning_rate_share

TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 32,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "torch_dtype": "float32",
}  # fmt: skip
LONG = {"num_epochs": 40, "batch_tokens": 512}
METHODS = pytest.mark.parametrize("method", ["eagle3", "medusa"])


def weights_of(trainer: Trainer) -> dict[str, Any]:
    return {name: weight.tolist() for name, weight in trainer.trainee.weights.items()}


@METHODS
def test_the_loss_falls(new_settings: Any, new_trainer: Any, method: str) -> None:
    progress = list(new_trainer(new_settings(method=method, plan={"num_epochs": 6})).run())
    losses = [one.loss for one in progress]
    assert sum(losses[-5:]) < sum(losses[:5]) - 5 * 0.1  # the target's own entropy is not far below
    assert progress[-1].step == progress[-1].num_steps == len(progress)
    assert [one.step for one in progress if one.held_out is not None] == [*range(6, len(progress), 6), len(progress)]


@METHODS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_document_that_fills_a_batch_alone_is_learned_from(
    new_settings: Any, new_trainer: Any, monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(trainer_module, "fastest_dtype", lambda: dtype)
    trainer = new_trainer(new_settings(method=method, plan={"batch_tokens": 20}))
    before = weights_of(trainer)
    list(islice(trainer.run(), 3))
    assert weights_of(trainer) != before


@METHODS
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(
    new_settings: Any, new_trainer: Any, tmp_path: Path, method: str
) -> None:
    whole = new_trainer(new_settings(method=method, output=tmp_path / "whole"))
    losses = [progress.loss for progress in whole.run()]
    settings = new_settings(method=method)
    interrupted = new_trainer(settings)
    list(islice(interrupted.run(), 8))  # two steps after the checkpoint of step 6
    resumed = new_trainer(settings)
    resumed.resume()
    assert [progress.loss for progress in resumed.run()] == losses[6:]
    assert weights_of(resumed) == weights_of(whole)


def test_a_checkpoint_that_was_interrupted_leaves_the_one_before(
    new_settings: Any, new_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = new_settings()
    trainer = new_trainer(settings)
    list(islice(trainer.run(), 6))
    good = settings.checkpoint.read_bytes()

    def save_half(state: dict[str, Any], file: Any) -> None:
        file.write(good[: len(good) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        trainer._save()
    assert settings.checkpoint.read_bytes() == good
    new_trainer(settings).resume()


def test_a_damaged_or_missing_checkpoint_and_another_plan_are_refused(new_settings: Any, new_trainer: Any) -> None:
    settings = new_settings()
    trainer = new_trainer(settings)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt.*no such checkpoint"):
        trainer.resume()
    list(islice(trainer.run(), 6))
    with pytest.raises(ConfigError, match=r"--resume: learning_rate=0.5.*0\.02"):
        new_trainer(new_settings(plan={"learning_rate": 0.5})).resume()
    settings.checkpoint.write_bytes(settings.checkpoint.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="is damaged"):
        trainer.resume()


def test_another_target_is_not_gone_on_with(new_settings: Any, new_trainer: Any, folder: Path, tmp_path: Path) -> None:
    """Its samples may be the same by chance, and what it teaches is not."""
    list(islice(new_trainer(new_settings()).run(), 6))
    other = shutil.copytree(folder, tmp_path / "other")
    save_random_checkpoint(other, json.loads((other / "config.json").read_text("utf-8")), seed=4)
    with pytest.raises(ConfigError, match="--resume: target="):
        new_trainer(new_settings(model=ModelConfigSection(path=str(other)))).resume()


@pytest.mark.parametrize("change", [{"quantization": "w8a8"}, {"dtype": "bfloat16"}, {"revision": "2"}])
def test_a_target_that_computes_otherwise_is_not_gone_on_with(
    new_settings: Any, new_trainer: Any, folder: Path, change: dict[str, Any]
) -> None:
    list(islice(new_trainer(new_settings()).run(), 6))
    with pytest.raises(ConfigError, match="--resume: target="):
        new_trainer(new_settings(model=ModelConfigSection(path=str(folder), **change))).resume()


@pytest.mark.parametrize("began_in", [torch.bfloat16, torch.float32], ids=str)
def test_a_run_goes_on_with_its_own_arithmetic_on_a_machine_that_would_begin_with_another(
    new_settings: Any, new_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began_in: torch.dtype
) -> None:
    other = torch.float32 if began_in == torch.bfloat16 else torch.bfloat16
    losses, settings = {}, new_settings()
    for dtype in (began_in, other):
        monkeypatch.setattr(trainer_module, "fastest_dtype", lambda dtype=dtype: dtype)
        whole = new_trainer(new_settings(output=tmp_path / str(dtype)))
        losses[dtype] = [progress.loss for progress in islice(whole.run(), 10)]
    assert losses[began_in] != losses[other]
    monkeypatch.setattr(trainer_module, "fastest_dtype", lambda: began_in)
    list(islice(new_trainer(settings).run(), 6))
    monkeypatch.setattr(trainer_module, "fastest_dtype", lambda: other)
    resumed = new_trainer(settings)
    resumed.resume()
    assert resumed.computes_in == began_in
    assert [progress.loss for progress in islice(resumed.run(), 4)] == losses[began_in][6:]


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(new_settings: Any, new_trainer: Any) -> None:
    trainer = new_trainer(new_settings())
    list(islice(trainer.run(), 6))
    with torch.no_grad():
        trainer.trainee.weights["fc.weight"].fill_(float("nan"))
    before = trainer._checkpoint.read_bytes()
    with pytest.raises(ConfigError, match=r"--learning-rate=0.02: in step 7 the loss is no number"):
        list(trainer.run())
    assert trainer._checkpoint.read_bytes() == before


def test_who_reads_the_layers_of_the_authors_or_none_needs_no_note(
    new_settings: Any, documents: Sequence[Document], tmp_path: Path
) -> None:
    save_random_checkpoint(tmp_path, {**TARGET, "num_hidden_layers": 8}, seed=1)
    for method, layers, is_noted in (("eagle3", None, False), ("eagle3", (2, 4, 7), True), ("medusa", None, False)):
        model = ModelConfigSection(path=str(tmp_path))
        settings = new_settings(model=model, method=method, capture_layers=layers)
        trainer = build_trainer(settings, Documents(documents[8:], documents[:8]), load_target(settings))
        assert (layers_note(trainer) is not None) == is_noted


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    shares = [learning_rate_share(step, 100) for step in range(101)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert shares[100] == 0
    assert shares[3:] == sorted(shares[3:], reverse=True)


@pytest.mark.parametrize(("method", "vocabulary"), [("eagle3", None), ("eagle3", 120), ("medusa", None)])
def test_held_out_acceptance_is_what_the_engine_measures_with_the_head(
    new_settings: Any, documents: Sequence[Document], method: str, vocabulary: int | None
) -> None:
    settings = new_settings(method=method, draft_vocab_size=vocabulary, plan=LONG)
    require_the_engine_to_count_what_was_measured(settings, documents)


@METHODS
@pytest.mark.parametrize("changes", [*FAMILIES.values(), ROPE_SCALED], ids=[*FAMILIES, "rope-scaled"])
def test_a_head_is_served_as_it_was_trained_for_a_target_with_more_than_its_layout_has(
    new_settings: Any, tmp_path: Path, documents: Sequence[Document], method: str, changes: dict[str, Any]
) -> None:
    save_random_checkpoint(tmp_path, {**TARGET, "num_hidden_layers": 4, **changes}, seed=3)
    save_byte_tokenizer(tmp_path)
    settings = new_settings(method=method, model=ModelConfigSection(path=str(tmp_path)), plan=LONG)
    require_the_engine_to_count_what_was_measured(settings, documents)


def require_the_engine_to_count_what_was_measured(settings: RunSettings, documents: Sequence[Document]) -> None:
    """Of a head that has learned these answers, which is exported and loaded again."""
    folder = settings.model.folder
    held_out = greedy_answers(folder, documents[:6])
    trainer = build_trainer(settings, Documents(held_out, held_out), load_target(settings))
    list(trainer.run())
    with torch.no_grad():
        for weight in trainer.trainee.weights.values():
            weight.copy_(weight.bfloat16())  # as they are stored
    export_head(settings, trainer)
    measured = trainer.measure()
    assert measured.tokens_per_step > 1.2
    head = {"method": settings.method, "model": str(settings.output)}
    speculation = {**head, "num_speculative_tokens": 3, "adaptive": False}
    # Torch's kernels compute the head as it was trained; native ones may round it to eight bits.
    llm = LLM(folder, num_threads=1, num_blocks=64, kernels="torch", speculation=speculation)
    counted = tokens_of_steps(llm, held_out)
    assert len(counted) == measured.num_steps
    assert sum(counted) == measured.num_steps + measured.num_accepted_tokens
    for position, accepted in enumerate(measured.accepted_per_position, start=1):
        assert sum(count > position for count in counted) == accepted


def greedy_answers(folder: Path, prompts: Sequence[Document]) -> list[Document]:
    llm = LLM(folder, num_threads=1, num_blocks=64)
    outputs = llm.generate([prompt.prompt for prompt in prompts], SamplingParams(temperature=0.0, max_tokens=40))
    return [
        Document((*prompt.prompt, *output.outputs[0].token_ids), prompt.num_prompt_tokens)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def tokens_of_steps(llm: LLM, answers: Sequence[Document]) -> list[int]:
    """Of all steps after a prompt's own; one request at a time."""
    counts: list[int] = []
    for answer in answers:
        num_tokens = len(answer.token_ids) - answer.num_prompt_tokens
        steps = outputs_of(llm, answer.prompt, num_tokens)
        assert sum(steps, start=()) == answer.token_ids[answer.num_prompt_tokens :]
        counts += map(len, steps[1:])
    return counts


def outputs_of(llm: LLM, prompt: tuple[int, ...], num_tokens: int) -> list[tuple[int, ...]]:
    [spec] = llm._specs(prompt, SamplingParams(temperature=0.0, max_tokens=num_tokens), 0)
    llm.engine.add(spec)
    steps = []
    while llm.engine.has_work:
        steps += [output.token_ids for output in llm.engine.step().outputs]
    return [token_ids for token_ids in steps if token_ids]
