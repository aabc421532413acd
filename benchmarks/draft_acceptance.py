"""How many tokens a step brings with an EAGLE-3 head, by shape of its guesses and temperature: counts, not times.

    python benchmarks/draft_acceptance.py held_out.jsonl --json acceptance.json --markdown > acceptance.md

The prompts should be such as the head has not learned from; ``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import msgspec
from provenance import Provenance, provenance
from report import Section, to_markdown, to_terminal
from rich.console import Console

from eagleray import LLM, SamplingParams
from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.engine.engine import StepOutcome

SHAPES: Final = {
    "chain of 3": {"num_speculative_tokens": 3},
    "chain of 5": {"num_speculative_tokens": 5},
    "tree of 15, 5 deep": {"num_speculative_tokens": 5, "tree_branching": 4, "tree_nodes": 15},
    "tree of 31, 6 deep": {"num_speculative_tokens": 6, "tree_branching": 5, "tree_nodes": 31},
}
_NUM_BLOCKS: Final = 4096
_MAX_NUM_SEQS: Final = 8  # so few that a step has room for all their guesses, prompts or not


@dataclass(frozen=True)
class Row:
    """What came of the guesses in all answers."""

    shape: str
    temperature: float
    tokens_per_step: float
    acceptance: Acceptance


@dataclass(frozen=True)
class Report:
    """Everything about one run."""

    origin: Provenance
    num_prompts: int
    verification: str  # the rule
    rows: list[Row]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    prompts = read_questions(options.chats, options.num_chats)
    origin = provenance()
    rows = [row for name in _shapes(options) for row in measure(options, name, prompts)]
    report = Report(origin, len(prompts), options.verification, rows)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if options.markdown:
        print(to_markdown(sections(report)))
    else:
        Console(file=sys.stdout).print(to_terminal(sections(report)))
    return 0


def read_questions(path: Path, num_chats: int) -> list[list[dict[str, str]]]:
    """Chats without their last answer, from the beginning of a file. Exits if there are lines of another kind."""
    lines = path.read_text(encoding="utf-8").splitlines()[:num_chats]
    chats = [msgspec.json.decode(line).get("messages") for line in lines]
    if not all(chats):
        raise SystemExit(f"{path}: line {chats.index(None) + 1} has no messages; give a file of chats")
    return [_question(chat) for chat in chats]


def measure(options: argparse.Namespace, name: str, prompts: list[list[dict[str, str]]]) -> list[Row]:
    """Of one shape, at each temperature."""
    rule = {"verification": options.verification}
    speculation = {"method": "eagle3", "model": options.draft, "adaptive": False, **rule, **SHAPES[name]}
    llm = LLM(
        options.model,
        num_threads=options.num_threads,
        num_blocks=_NUM_BLOCKS,
        max_num_seqs=_MAX_NUM_SEQS,
        speculation=speculation,
    )
    rows = []
    for temperature in options.temperatures:
        sampling = SamplingParams(temperature=temperature, max_tokens=options.max_tokens, seed=1)
        found = count(llm, prompts, sampling)
        rows.append(Row(name, temperature, found.tokens_per_step, found))
    return rows


def count(llm: LLM, prompts: list[list[dict[str, str]]], sampling: SamplingParams) -> Acceptance:
    """What came of the guesses in all answers."""
    with counted_steps(llm) as steps:
        llm.chat(prompts, sampling)
    return total_acceptance(steps) or Acceptance()


@contextmanager
def counted_steps(llm: LLM) -> Iterator[list[Acceptance | None]]:
    """Fills with what came of the guesses in each step."""
    steps: list[Acceptance | None] = []
    take_step = llm.engine.step

    def counted_step() -> StepOutcome:
        outcome = take_step()
        steps.append(outcome.acceptance)
        return outcome

    llm.engine.step = counted_step  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        llm.engine.step = take_step  # type: ignore[method-assign]


def sections(report: Report) -> list[Section]:
    """What a run is printed as."""
    run = {**asdict(report.origin), "prompts": str(report.num_prompts), "verification": report.verification}
    head = ("guesses", "temperature", "tokens per step", "steps", "accepted by position")
    rows = [
        (
            row.shape,
            f"{row.temperature:g}",
            f"{row.tokens_per_step:.2f}",
            f"{row.acceptance.num_steps}",
            " ".join(f"{share:.2f}" for share in row.acceptance.rate_per_position),
        )
        for row in report.rows
    ]
    return [
        Section(("run", ""), [(name, str(value)) for name, value in run.items()]),
        Section(head, rows),
    ]


def _shapes(options: argparse.Namespace) -> list[str]:
    """Those that were asked for and go with the rule."""
    if options.verification != "rejection":
        return list(options.shapes)
    chains = [name for name in options.shapes if "tree_branching" not in SHAPES[name]]
    if not chains:
        raise SystemExit("--verification rejection is for chains; name one in --shapes, or leave --verification out")
    if len(chains) < len(options.shapes):
        print("--verification rejection is for chains, so trees are left out", file=sys.stderr)
    return chains


def _question(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """All but the answer."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_shared_arguments(parser, num_chats=256)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    rules = ("target_token", "rejection")
    parser.add_argument("--verification", choices=rules, default=rules[0], help="rule; see operations.md")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.7], metavar="T")
    return parser


def add_shared_arguments(parser: argparse.ArgumentParser, num_chats: int) -> None:
    """Of all programs that count what comes of a head's guesses."""
    parser.add_argument("chats", type=Path, help="JSON lines with messages")
    parser.add_argument("--model", default="demo", help="folder of the model, or demo")
    parser.add_argument("--draft", default="demo", help="folder of the head, or demo")
    parser.add_argument("--num-chats", type=int, default=num_chats, metavar="N", help="of the file, from its beginning")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of each answer")
    parser.add_argument("--num-threads", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was counted")
    parser.add_argument("--markdown", action="store_true", help="print Markdown, for pasting into results/")


if __name__ == "__main__":
    sys.exit(main())
