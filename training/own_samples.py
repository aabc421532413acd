"""Answers of the target itself, sampled by our own engine: a head drafts for what the target writes, not for what
others wrote. Kept in a file line by line, so that whoever is interrupted goes on where it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from eagleray.core.errors import ConfigError
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.llm import LLM
from eagleray.training.texts import Document, digest

_BATCH_PROMPTS: Final = 512  # answered before they are written down


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the target answers."""

    temperatures: tuple[float, ...]  # in turn
    max_tokens: int  # of prompt and answer
    seed: int
    target: str  # who answers: ``compute_model_identity``


def write_own_samples(
    llm: LLM, prompts: Sequence[Document], settings: SamplingSettings, path: Path
) -> Iterator[tuple[int, int]]:
    """Answer all prompts into ``path``, but for those that are answered there; yields (answers, tokens) there so far.

    Raises:
        ConfigError: the file was made from other prompts or with other settings.
    """
    heading = {
        "prompts": digest([Document(prompt.prompt, prompt.num_prompt_tokens) for prompt in prompts]),
        **asdict(settings),
    }
    num_answers, num_tokens = _complete_lines(path, json.loads(json.dumps(heading)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        if path.stat().st_size == 0:
            _write_lines(file, [heading])
        while num_answers < len(prompts):
            yield num_answers, num_tokens
            batch = prompts[num_answers : num_answers + _BATCH_PROMPTS]
            answers = _answer(llm, batch, num_answers, settings)
            _write_lines(file, [{"num_prompt_tokens": d.num_prompt_tokens, "token_ids": d.token_ids} for d in answers])
            num_answers += len(answers)
            num_tokens += sum(len(document.token_ids) - document.num_prompt_tokens for document in answers)
    yield num_answers, num_tokens


def read_own_samples(path: Path) -> list[Document]:
    """All answers of a file that ``write_own_samples`` has finished, with their prompts."""
    _, *lines = path.read_text(encoding="utf-8").splitlines()
    return [Document(tuple(record["token_ids"]), record["num_prompt_tokens"]) for record in map(json.loads, lines)]


def _answer(llm: LLM, prompts: Sequence[Document], first: int, settings: SamplingSettings) -> list[Document]:
    temperatures = settings.temperatures
    params = [
        SamplingParams(
            temperature=temperatures[index % len(temperatures)],
            max_tokens=settings.max_tokens - prompt.num_prompt_tokens,
            seed=settings.seed * 1_000_003 + index,
        )
        for index, prompt in enumerate(prompts, start=first)
    ]
    outputs = llm.generate([prompt.prompt for prompt in prompts], params)
    return [
        Document((*prompt.prompt, *output.outputs[0].token_ids), prompt.num_prompt_tokens)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _complete_lines(path: Path, heading: dict[str, Any]) -> tuple[int, int]:
    """(answers, their tokens) in the file; a line that was being written when it ended is cut off."""
    if not path.exists():
        return 0, 0
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    lines = content[:end].splitlines()
    if not lines:
        return 0, 0
    if json.loads(lines[0]) != heading:
        way_out = "holds samples for other data or settings; give these again, or another --output"
        raise ConfigError("--output", str(path), way_out)
    records = [json.loads(line) for line in lines[1:]]
    return len(records), sum(len(record["token_ids"]) - record["num_prompt_tokens"] for record in records)


def _write_lines(file: IO[str], records: Sequence[dict[str, Any]]) -> None:
    file.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    file.flush()
