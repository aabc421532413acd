"""Replay a request trace against a running server, on schedule, and report what clients saw.

    python benchmarks/replay.py --trace conversation_trace.jsonl.gz --requests 60 --speedup 0.5
    python benchmarks/replay.py --requests 200 --seed 1 --json result.json      # made-up requests, no file needed

Lengths are scaled to the served model. ``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from load import LoadOptions, Outcome, ServedModel, ServerError, ask_server, replay
from measure import Report, report
from mooncake import TraceError, TraceRequest, generate_trace, read_trace
from provenance import Provenance, provenance
from report import sections, to_markdown, to_terminal
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from workload import MAX_TOKEN_VALUES, Limits, Workload, build_workload


@dataclass(frozen=True)
class Run:
    """Everything about one replay."""

    origin: Provenance
    options: argparse.Namespace
    served: ServedModel
    workload: Workload
    outcomes: Sequence[Outcome]
    result: Report


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 when every request was answered whole."""
    options = parse_options(arguments)
    try:
        run = asyncio.run(run_replay(options, _rows(options)))
    except (TraceError, ServerError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    _show(run)
    if options.json:
        options.json.write_bytes(_as_json(run))
    return 0 if run.result.num_completed == run.result.num_requests else 1


async def run_replay(options: argparse.Namespace, rows: Sequence[TraceRequest]) -> Run:
    """Ask the server what it serves, fit ``rows`` to it, and send them. Raises ``ServerError``."""
    origin = provenance()
    connections = httpx.Limits(max_connections=options.max_concurrency)
    async with httpx.AsyncClient(
        base_url=options.url,
        timeout=options.timeout_s,
        limits=connections,
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
    return Run(origin, options, served, workload, outcomes, report(outcomes, workload))


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


def _rows(options: argparse.Namespace) -> list[TraceRequest]:
    if options.trace is not None:
        return read_trace(options.trace, options.start, options.requests)
    return generate_trace(options.start + options.requests, options.seed)[options.start :]


def _show(run: Run) -> None:
    options, origin = run.options, run.origin
    source = options.trace.name if options.trace else f"generated, seed {options.seed}"
    last = options.start + run.result.num_requests - 1
    title = (
        f"{source}, requests {options.start} to {last}, speed x{options.speedup:g}, {run.served.name}, "
        f"{origin.num_cores} x {origin.cpu}, commit {origin.git_commit}, {origin.date}"
    )
    shown = sections(run.result, run.workload)
    if options.markdown:
        print(f"{title}\n\n{to_markdown(shown)}")
    else:
        Console().print(title, to_terminal(shown), sep="\n", highlight=False, markup=False)


def _as_json(run: Run) -> bytes:
    scaling = run.workload.scaling
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run.options).items()}
    everything = {
        "provenance": asdict(run.origin),
        "options": options,
        "server": asdict(run.served),
        "scaling": {**asdict(scaling), "factor": scaling.factor},
        "report": asdict(run.result),
        "requests": [_request_row(outcome) for outcome in run.outcomes],
    }
    return msgspec.json.format(msgspec.json.encode(everything)) + b"\n"


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


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Ends the program with a message for options that cannot be followed, before any request is sent."""
    parser = _parser()
    options = parser.parse_args(arguments)
    first, last = options.token_ids
    if not first <= last < first + MAX_TOKEN_VALUES:
        parser.error(f"--token-ids {first} {last}: must be FIRST and LAST of 1 to {MAX_TOKEN_VALUES} tokens")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}; make it first")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="replay.py",
        description="Replay a request trace against a running server and report what clients saw.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server")
    add("--trace", type=Path, help=".jsonl or .jsonl.gz in Mooncake's format; without: requests like its statistics")
    add("--seed", type=int, default=0, help="of the requests that are made up")
    add("--start", type=_count, default=0, help="first request of the trace, from 0")
    add("--requests", type=_positive_count, default=100, help="how many, at most")
    add("--speedup", type=_positive, default=1.0, help="2: twice as fast as recorded; 0.5: half as fast")
    add("--scale", type=_positive, help="factor on all lengths; without: the largest that fits the model, at most 1")
    add("--kv-block-tokens", type=_positive_count, default=16, help="the server's KV block size")
    add("--token-ids", type=_count, nargs=2, default=(128, 255), metavar=("FIRST", "LAST"),
        help="prompts are made of these; they must be ordinary tokens of the vocabulary")  # fmt: skip
    add("--max-concurrency", type=_positive_count, default=128, help="requests in flight; more wait in the client")
    add("--timeout-s", type=_positive, default=120.0, help="for one answer")
    add("--total-timeout-s", type=_positive, default=900.0, help="for everything; then what is left is unfinished")
    add("--cache-salt", default=f"replay-{time.time_ns():x}",
        help="runs with the same salt share cached prefixes; the default keeps every run apart")  # fmt: skip
    add("--json", type=Path, help="write everything to this file")
    add("--markdown", action="store_true", help="print the report as Markdown")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _positive_count(text: str) -> int:
    return int(_positive(str(_count(text))))


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
    return value


if __name__ == "__main__":
    sys.exit(main())
