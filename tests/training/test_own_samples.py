"""Answers of the target itself: written once, however often the run is interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from eagleray.core.config import ModelConfigSection
from eagleray.core.errors import ConfigError
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.llm import LLM
from eagleray.training import own_samples
from eagleray.training.own_samples import SamplingSettings, read_own_samples, write_own_samples
from eagleray.training.run import gather_documents
from eagleray.training.texts import Document

SETTINGS = SamplingSettings(temperatures=(0.0, 0.9), max_tokens=14, seed=1, target="fish")
PROMPTS = [Document(tuple(range(number, number + 4)), 4) for number in range(6)]


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_threads=1, num_blocks=64)


@pytest.fixture(autouse=True)
def two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(own_samples, "_BATCH_PROMPTS", 2)
    yield


def test_every_prompt_is_answered_at_its_temperature(llm: LLM, tmp_path: Path) -> None:
    counts = list(write_own_samples(llm, PROMPTS, SETTINGS, tmp_path / "samples.jsonl"))
    answers = read_own_samples(tmp_path / "samples.jsonl")
    assert [answer.prompt for answer in answers] == [prompt.prompt for prompt in PROMPTS]
    assert all(4 < len(answer.token_ids) <= 14 for answer in answers)
    assert [count for count, _ in counts] == [0, 2, 4, 6]
    assert counts[-1][1] == sum(len(answer.token_ids) - 4 for answer in answers)
    greedy = llm.generate([PROMPTS[2].prompt], own_samples.SamplingParams(temperature=0.0, max_tokens=10))
    assert list(answers[2].token_ids[4:]) == greedy[0].outputs[0].token_ids


def test_what_was_answered_is_not_answered_again(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "samples.jsonl"
    list(write_own_samples(llm, PROMPTS, SETTINGS, whole))
    list(islice(write_own_samples(llm, PROMPTS, SETTINGS, path), 3))  # four are there
    with path.open("a", encoding="utf-8") as file:
        file.write('{"num_prompt_tokens":4,"token_')  # the power fails
    asked: list[int] = []
    answer = own_samples._answer

    def noted(llm: LLM, prompts: list[Document], first: int, settings: SamplingSettings) -> list[Document]:
        asked.append(len(prompts))
        return answer(llm, prompts, first, settings)

    monkeypatch.setattr(own_samples, "_answer", noted)
    list(write_own_samples(llm, PROMPTS, SETTINGS, path))
    assert asked == [2]
    assert path.read_text() == whole.read_text()


def test_samples_for_other_prompts_or_settings_or_of_another_target_are_refused(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    list(write_own_samples(llm, PROMPTS[:2], SETTINGS, path))
    others = (replace(SETTINGS, temperatures=(0.0,)), replace(SETTINGS, target="another"))
    for prompts, settings in ((PROMPTS[:3], SETTINGS), *((PROMPTS[:2], other) for other in others)):
        with pytest.raises(ConfigError, match=r"samples\.jsonl': holds samples for other data or settings"):
            list(write_own_samples(llm, prompts, settings, path))


def test_a_target_answers_in_the_format_that_is_served(new_settings: Any, folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"number {number}"}) + "\n" for number in range(12)))
    model = ModelConfigSection(path=str(folder), quantization="w8a8")
    settings = new_settings(model=model, data=(data,), temperatures=(0.0,), max_tokens=48)
    documents = gather_documents(settings, print)
    prompts = [document.prompt for document in documents.learned]
    served, of_another = (
        greedy_answers(LLM(folder, num_threads=1, num_blocks=64, quantization=name), prompts) for name in ("w8a8", None)
    )
    assert [document.token_ids[document.num_prompt_tokens :] for document in documents.learned] == served != of_another


def greedy_answers(llm: LLM, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    params = [SamplingParams(temperature=0.0, max_tokens=48 - len(prompt)) for prompt in prompts]
    return [tuple(output.outputs[0].token_ids) for output in llm.generate(list(prompts), params)]
