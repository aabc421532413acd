"""One load on one server, from the options to the report: what ``replay.py`` and ``serve.py`` share."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from load import LoadOptions, Outcome, ServedModel, ask_server, replay
from measure import Objective, Report, report
from mooncake import TraceRequest
from provenance import Provenance, provenance
from report import sections, to_markdown, to_terminal
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from workload import MAX_TOKEN_VALUES, Limits, Workload, build_workload

from eagleray.core.config import read_environment

_SECRET: Final = "api_key"  # the one option that is written nowhere


@dataclass(frozen=True)
class Run:
    """Everything about one load."""

    origin: Provenance
    options: argparse.Namespace
    served: ServedModel
    workload: Workload
    outcomes: Sequence[Outcome]
    result: Report

    @property
    def exit_status(self) -> int:
        """0 when every request was answered whole."""
        return 0 if self.result.num_completed == self.result.num_requests else 1


async def run_load(
    options: argparse.Namespace, rows: Sequence[TraceRequest], objective: Objective | None = None
) -> Run:
    """Ask the server what it serves, fit ``rows`` to it, and send them. Raises ``ServerError``."""
    origin = provenance()
    key = options.api_key or read_environment().api_key
    async with httpx.AsyncClient(
        base_url=options.url,
        headers={"Authorization": f"Bearer {key}"} if key else None,
        timeout=options.timeout_s,
        limits=httpx.Limits(max_connections=options.max_concurrency),
        trust_env=False,  # no proxy in between
    ) as client:
        served = await ask_server(client)
        limits = Limits(served.max_model_tokens, options.kv_block_tokens, tuple(options.token_ids))
        workload = build_workload(rows, limits, options.speedup, options.scale)
        load = LoadOptions(
            served.name, options.max_concurrency, options.timeout_s, options.total_timeout_s, options.cache_salt
        )
        with _progress() as progress:
            outcomes = await replay(client, workload, load, _Counter(progress, len(rows)))
    return Run(origin, options, served, workload, outcomes, report(outcomes, workload, objective))


class _Counter:
    """Shows how many requests have been sent, answered and lost."""

    def __init__(self, progress: Progress, num_requests: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=num_requests, sent=0, failed=0)
        self._sent = self._failed = 0

    def __call__(self, outcome: Outcome) -> None:
        has_ended = outcome.answer is not None or outcome.error is not None
        self._sent += not has_ended
        self._failed += outcome.error is not None
        self._progress.update(self._task, advance=int(has_ended), sent=self._sent, failed=self._failed)


def _progress() -> Progress:
    text = TextColumn("answered; {task.fields[sent]} sent, {task.fields[failed]} failed")
    return Progress(BarColumn(), MofNCompleteColumn(), text, TimeElapsedColumn(), console=Console(stderr=True))


def show(run: Run, source: str) -> None:
    """Print the report; ``source`` says where the requests came from."""
    origin = run.origin
    title = f"{source}, {run.served.name}, {origin.num_cores} x {origin.cpu}, commit {origin.git_commit}, {origin.date}"
    shown = sections(run.result, run.workload)
    if run.options.markdown:
        print(f"{title}\n\n{to_markdown(shown)}")
    else:
        Console().print(title, to_terminal(shown), sep="\n", highlight=False, markup=False)


def as_json(run: Run) -> bytes:
    return msgspec.json.format(msgspec.json.encode(as_dict(run))) + b"\n"


def as_dict(run: Run) -> dict[str, Any]:
    """Everything but the key."""
    scaling = run.workload.scaling
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(run.options).items()
        if name != _SECRET
    }
    return {
        "provenance": asdict(run.origin),
        "options": options,
        "server": asdict(run.served),
        "scaling": {**asdict(scaling), "factor": scaling.factor},
        "report": asdict(run.result),
        "requests": [_request_row(outcome) for outcome in run.outcomes],
    }


def _request_row(outcome: Outcome) -> dict[str, Any]:
    request, answer = outcome.request, outcome.answer
    row = {
        "due_s": request.due_s,
        "sent_s": outcome.sent_s,
        "prompt_tokens": request.num_prompt_tokens,
        "output_tokens": request.num_output_tokens,
        "error": outcome.error,
    }
    if answer is None:
        return row
    times_s = {"first_s": answer.chunk_times_s[0], "last_s": answer.chunk_times_s[-1], "end_s": answer.end_s}
    return {**row, **times_s, "cached_tokens": answer.usage.cached_tokens, "timing": answer.timing}


def add_load_arguments(parser: argparse.ArgumentParser, program: str) -> None:
    """The server, what prompts are made of, patience, and where the report goes."""
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server")
    add("--api-key", help="sent as a bearer token; default: EAGLERAY_API_KEY, if set")
    add("--kv-block-tokens", type=positive_count, default=16, help="the server's KV block size")
    add("--token-ids", type=count, nargs=2, default=(128, 255), metavar=("FIRST", "LAST"),
        help="prompts are made of these; they must be ordinary tokens of the vocabulary")  # fmt: skip
    add("--timeout-s", type=positive, default=120.0, help="for one answer")
    add("--total-timeout-s", type=positive, default=900.0, help="for everything; then what is left is unfinished")
    add("--cache-salt", default=f"{program}-{time.time_ns():x}",
        help="runs with the same salt share cached prefixes; the default keeps every run apart")  # fmt: skip
    add("--json", type=Path, help="write everything to this file")
    add("--markdown", action="store_true", help="print the report as Markdown")


def parse_load_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Ends the program with a message for options that cannot be followed, before any request is sent."""
    options = parser.parse_args(arguments)
    first, last = options.token_ids
    if not first <= last < first + MAX_TOKEN_VALUES:
        parser.error(f"--token-ids {first} {last}: must be FIRST and LAST of 1 to {MAX_TOKEN_VALUES} tokens")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}; make it first")
    return options


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def positive_count(text: str) -> int:
    return int(positive(str(count(text))))


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
    return value
