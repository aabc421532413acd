"""Whether vLLM loads a head that was trained here, and guesses as well with it: counts, not times.

    python benchmarks/draft_in_vllm.py benchmarks/prompts/demo_held_out.jsonl --vllm-python peers/vllm/bin/python

vLLM answers the first prompts of a file of chats greedily without and with the head, then our engine does with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from contenders import vllm_environment
from draft_acceptance import add_shared_arguments, counted_steps, read_questions
from provenance import Provenance, provenance
from report import Section, to_markdown, to_terminal
from rich.console import Console

from eagleray import LLM, SamplingParams
from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.config import DEMO_DRAFT_PATH, DEMO_MODEL, parse_config
from eagleray.models.draft_heads.read import read_draft
from eagleray.models.registry import load_model_config
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.tokenizer import Tokenizer

_PEER: Final = Path(__file__).resolve().parent / "peers" / "guess_vllm.py"
_PEER_TIMEOUT_S: Final = 1800
_MAX_NUM_SEQS: Final = 8
_NUM_BLOCKS: Final = 4096
_KV_GIB: Final = 1


class PeerError(RuntimeError):
    """vLLM did not answer; the text has its last words."""


@dataclass(frozen=True)
class Answered:
    """What an engine made of all prompts."""

    engine: str
    guesses: bool
    answers: list[list[int]]
    acceptance: Acceptance


@dataclass(frozen=True)
class Row:
    """The same, beside vLLM without guesses."""

    engine: str
    guesses: bool
    num_tokens: int
    num_same_answers: int
    tokens_per_step: float  # after the first token of each answer
    acceptance: Acceptance


@dataclass(frozen=True)
class Report:
    """Everything about one run."""

    origin: Provenance
    method: str
    dtype: str
    num_guesses: int
    num_prompts: int
    rows: list[Row]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 when vLLM did not answer."""
    options = _parser().parse_args(arguments)
    origin = provenance()
    folder = parse_config({"model": {"path": options.model}}).model.folder
    draft = DEMO_DRAFT_PATH if options.draft == DEMO_MODEL else Path(options.draft)
    method = read_draft(draft, load_model_config(folder)).method
    prompts = _prompts(folder, options)
    speculation = {"method": method, "model": str(draft), "num_speculative_tokens": options.num_guesses}
    try:
        plain, guessing = [ask_vllm(options, folder, prompts, guesses) for guesses in (None, speculation)]
    except PeerError as error:
        print(error, file=sys.stderr)
        return 1
    rows = [_beside(plain, each) for each in (plain, guessing, _ask_ours(options, prompts, speculation))]
    report = Report(origin, method, options.dtype, options.num_guesses, len(prompts), rows)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if options.markdown:
        print(to_markdown(sections(report)))
    else:
        Console(file=sys.stdout).print(to_terminal(sections(report)))
    return 0


def ask_vllm(
    options: argparse.Namespace, folder: Path, prompts: list[list[int]], speculation: dict[str, Any] | None
) -> Answered:
    """Raises ``PeerError``."""
    settings = {
        "model": str(folder),
        "dtype": options.dtype,
        "max_model_len": max(map(len, prompts)) + options.max_tokens,
        "max_num_seqs": _MAX_NUM_SEQS,
        "enable_prefix_caching": False,
        "enforce_eager": True,  # nothing is timed, and compiling takes a minute
        "disable_log_stats": False,  # the counts
        "speculative_config": speculation,
    }
    asked = json.dumps({"settings": settings, "prompts": prompts, "output_tokens": options.max_tokens})
    try:
        done = subprocess.run(
            [options.vllm_python, _PEER], input=asked, capture_output=True, text=True, timeout=_PEER_TIMEOUT_S,
            check=True, env=os.environ | _environment(options),
        )  # fmt: skip
        told = json.loads(done.stdout)
    except OSError as error:
        raise PeerError(f"--vllm-python {options.vllm_python}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise PeerError(f"vLLM did not answer within {_PEER_TIMEOUT_S:g} s") from None
    except subprocess.CalledProcessError as error:
        last_words = error.stderr.strip().rpartition("\n")[2]
        raise PeerError(f"vLLM did not answer: {last_words or error}") from None
    return Answered(f"vllm {told['version']}", speculation is not None, told["answers"], _acceptance(told["guesses"]))


def sections(report: Report) -> list[Section]:
    """What a run is printed as."""
    names = {
        "method": report.method,
        "dtype": report.dtype,
        "guesses": report.num_guesses,
        "prompts": report.num_prompts,
    }
    run = {**asdict(report.origin), **names}
    head = (
        "engine",
        "guesses",
        "tokens",
        "answers as vLLM's without",
        "steps",
        "tokens per step",
        "accepted by position",
    )
    rows = [
        (
            row.engine,
            "yes" if row.guesses else "no",
            f"{row.num_tokens:,}",
            f"{row.num_same_answers} of {report.num_prompts}",
            f"{row.acceptance.num_steps:,}" if row.guesses else "-",
            f"{row.tokens_per_step:.2f}",
            " ".join(f"{share:.2f}" for share in row.acceptance.rate_per_position) or "-",
        )
        for row in report.rows
    ]
    return [Section(("run", ""), [(name, str(value)) for name, value in run.items()]), Section(head, rows)]


def _prompts(folder: Path, options: argparse.Namespace) -> list[list[int]]:
    """Tokens, so that both engines get the same."""
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_folder(folder, tokenizer)
    texts = [template.render(chat) for chat in read_questions(options.chats, options.num_chats)]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _environment(options: argparse.Namespace) -> dict[str, str]:
    return vllm_environment(options.vllm_python) | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(options.num_threads),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.num_threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
    }


def _acceptance(counts: dict[str, Any]) -> Acceptance:
    """vLLM counts drafts, one at every step that decodes, and takes them as a whole: all reached every position."""
    num_drafts, accepted = counts.get("num_drafts", 0), counts.get("accepted_per_position", [])
    return Acceptance(
        num_steps=num_drafts,
        num_draft_tokens=counts.get("num_draft_tokens", 0),
        num_accepted_tokens=counts.get("num_accepted_tokens", 0),
        drafts_per_position=(num_drafts,) * len(accepted),
        accepted_per_position=tuple(accepted),
    )


def _ask_ours(options: argparse.Namespace, prompts: list[list[int]], speculation: dict[str, Any]) -> Answered:
    llm = LLM(
        options.model,
        dtype=options.dtype,
        num_threads=options.num_threads,
        num_blocks=_NUM_BLOCKS,
        max_num_seqs=_MAX_NUM_SEQS,
        speculation=speculation | {"adaptive": False},
    )
    with counted_steps(llm) as steps:
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=options.max_tokens))
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    return Answered("eagleray", True, answers, total_acceptance(steps) or Acceptance())


def _beside(plain: Answered, each: Answered) -> Row:
    same = sum(answer == expected for answer, expected in zip(each.answers, plain.answers, strict=True))
    num_tokens = sum(map(len, each.answers))
    num_later = num_tokens - len(each.answers)
    tokens_per_step = num_later / each.acceptance.num_steps if each.acceptance.num_steps else 1.0
    return Row(each.engine, each.guesses, num_tokens, same, tokens_per_step, each.acceptance)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_shared_arguments(parser, num_chats=64)
    parser.add_argument("--vllm-python", type=Path, required=True, metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--num-guesses", type=int, default=3, metavar="N", help="of a chain")
    parser.add_argument("--dtype", default="float32", help="of the model, in both engines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
