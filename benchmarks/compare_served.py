"""Servers in turn on one machine, under one load: eagleray's and vLLM's, aggregated and split.

    python benchmarks/compare_served.py --folder models --vllm-python vllm/bin/python --json result.json

Each is started, warmed up, loaded ``--repeats`` times by the load generator of ``serve.py``, and stopped. A split has
as many threads as the others, divided between its two workers. ``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from floors import Machine, in_child, measure_machine, shortest_load_s
from interference import OtherProcesses
from load import ServerError
from load_run import as_dict, positive, positive_count, run_load
from provenance import Provenance, provenance
from random_checkpoint import FIRST_TEXT_TOKEN_ID, SHAPES, checkpoint_folder
from report import Section, to_markdown, to_terminal
from rich.console import Console
from serve import build_rows, objective_of, parse_options
from servers import SERVERS, Server, StartError, running

from eagleray.models.registry import load_model_config

_DTYPE: Final = "bfloat16"  # of all servers


class Load(msgspec.Struct, frozen=True):
    """One load on one server."""

    server: str
    start_s: float  # from the start of its process until it answered
    others_share: float  # of the cores, what neither the server nor the client used
    run: dict[str, Any]  # as ``serve.py --json`` writes it


@dataclass(frozen=True)
class ServedComparison:
    """Everything about one comparison, which may have been made in pieces."""

    origins: Sequence[Provenance]
    loads: Sequence[Load]
    failures: Mapping[str, str]  # server -> why it was not measured
    machine: Machine  # beside the newest loads
    limit_tokens_per_s: float  # of output, that this machine allows


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every server was measured."""
    options = _parser().parse_args(arguments)
    found = _measure(options)
    if options.add and options.json.exists():
        before = msgspec.json.decode(options.json.read_bytes(), type=ServedComparison)
        found = ServedComparison(
            [*before.origins, *found.origins],
            [*before.loads, *found.loads],
            {**before.failures, **found.failures},
            found.machine,
            found.limit_tokens_per_s,
        )
    _show(found, options)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    return 1 if found.failures else 0


def _measure(options: argparse.Namespace) -> ServedComparison:
    checkpoint = checkpoint_folder(options.shape, options.folder)
    machine = in_child(measure_machine, _DTYPE, options.threads)
    limit_tokens_per_s = _limit_tokens_per_s(checkpoint, machine, options)
    loads: list[Load] = []
    failures: dict[str, str] = {}
    for name in options.servers:
        print(f"starting {name}", file=sys.stderr)
        try:
            loads += asyncio.run(_load(name, SERVERS[name](checkpoint, options), options))
        except (StartError, ServerError) as error:
            failures[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
    return ServedComparison([provenance()], loads, failures, machine, limit_tokens_per_s)


def _limit_tokens_per_s(checkpoint: Path, machine: Machine, options: argparse.Namespace) -> float:
    load_s = shortest_load_s(
        load_model_config(checkpoint), _DTYPE, machine, requests=options.requests, concurrency=options.concurrency,
        prompt=options.prompt_tokens, output=options.output_tokens,
    )  # fmt: skip
    return float(options.requests * options.output_tokens / load_s)


async def _load(name: str, server: Server, options: argparse.Namespace) -> list[Load]:
    """Raises ``StartError`` and ``ServerError``."""
    loads = []
    async with running(server, options.port) as (pid, start_s):
        await _one_load(options, options.concurrency)  # what is made at first use is there afterwards
        for _ in range(options.repeats):
            others = OtherProcesses(pid)
            run = await _one_load(options, options.requests)
            loads.append(Load(name, start_s, others.share(), run))
    return loads


async def _one_load(options: argparse.Namespace, num_requests: int) -> dict[str, Any]:
    """Every time under a salt of its own, so that no prefix is found."""
    asked = {
        "url": f"http://127.0.0.1:{options.port}",
        "requests": num_requests,
        "concurrency": options.concurrency,
        "prompt-tokens": options.prompt_tokens,
        "output-tokens": options.output_tokens,
        "timeout-s": options.timeout_s,
        "ttft-slo-ms": options.ttft_slo_ms,
        "tpot-slo-ms": options.tpot_slo_ms,
    }
    arguments = [f"--{name}={value}" for name, value in asked.items()]
    load = parse_options([*arguments, "--token-ids", str(FIRST_TEXT_TOKEN_ID), "1023"])
    return as_dict(await run_load(load, build_rows(load), objective_of(load)))


def _show(found: ServedComparison, options: argparse.Namespace) -> None:
    origin = found.origins[-1]
    title = (
        f"{options.shape} (random weights), {options.requests} requests of {options.prompt_tokens} + "
        f"{options.output_tokens} tokens, {options.concurrency} at a time, {options.threads} threads on "
        f"{origin.num_cores} x {origin.cpu}, commit {origin.git_commit}, {origin.date}; good: first token within "
        f"{options.ttft_slo_ms:g} ms and {options.tpot_slo_ms:g} ms per token after it"
    )
    shown = served_sections(found)
    if options.markdown:
        print(f"{title}\n\n{to_markdown(shown)}")
    else:
        Console().print(title, to_terminal(shown), sep="\n", highlight=False, markup=False)


def _milliseconds(field: str, percentile: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda report: 1000 * float(report["latencies_s"][field][percentile])


# By column: what of a report it shows, and the sign of what is better.
_COLUMNS: Final[Mapping[str, tuple[Callable[[Mapping[str, Any]], float], int]]] = {
    "TTFT p50, ms": (_milliseconds("time_to_first_token", "p50"), -1),
    "TTFT p95": (_milliseconds("time_to_first_token", "p95"), -1),
    "TTFT p99": (_milliseconds("time_to_first_token", "p99"), -1),
    "TPOT p50, ms": (_milliseconds("time_per_output_token", "p50"), -1),
    "TPOT p95": (_milliseconds("time_per_output_token", "p95"), -1),
    "end to end p50, ms": (_milliseconds("end_to_end", "p50"), -1),
    "end to end p95": (_milliseconds("end_to_end", "p95"), -1),
    "output tokens/s": (lambda report: float(report["throughput"]["output_tokens_per_s"]), 1),
    "goodput, /s": (lambda report: float(report["goodput"]["requests_per_s"]), 1),
}


def served_sections(found: ServedComparison) -> list[Section]:
    """Medians over the loads of each server; how many times better each of ours is; and what stands behind that."""
    loads: dict[str, list[Load]] = {}
    for load in found.loads:
        loads.setdefault(load.server, []).append(load)
    values = {
        server: [statistics.median(read(load.run["report"]) for load in its) for read, _ in _COLUMNS.values()]
        for server, its in loads.items()
    }
    rate = list(_COLUMNS).index("output tokens/s")
    shares = {server: row[rate] / found.limit_tokens_per_s for server, row in values.items()}
    limit = f"of the limit, {found.limit_tokens_per_s:,.0f} tokens/s"
    rows = [(server, *map(_figure, row), f"{shares[server]:.0%}") for server, row in values.items()]
    shown = [Section(("server", *_COLUMNS, limit), rows)]
    for ours in (server for server in values if server.startswith("eagleray")):
        peers = [(peer, *_times_better(values[ours], row)) for peer, row in values.items() if peer != ours]
        shown.append(Section((f"{ours}, times as good as", *_COLUMNS), peers))
    behind = [
        (
            server, f"{its[0].start_s:.0f}", str(len(its)),
            f"{sum(load.run['report']['num_completed'] for load in its)} of "
            f"{sum(load.run['report']['num_requests'] for load in its)}",
            f"{max(load.others_share for load in its):.1%}",
        )
        for server, its in loads.items()
    ]  # fmt: skip
    shown.append(Section(("server", "start, s", "loads", "completed", "others at most"), behind))
    failures = [(name, " ".join(why.split())) for name, why in found.failures.items() if name not in loads]
    shown.append(Section(("not measured", "why"), failures))
    return [section for section in shown if section.rows]


def _figure(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def _times_better(ours: Sequence[float], theirs: Sequence[float]) -> list[str]:
    """Above 1 is better for us, in every column."""
    signs = [sign for _, sign in _COLUMNS.values()]
    pairs = zip(ours, theirs, signs, strict=True)
    return [f"{(our / their) ** sign:.2f}" if our and their else "-" for our, their, sign in pairs]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_served.py",
        description="Load servers in turn on one machine, on the same random weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="for the checkpoint; kept for the next run")
    add("--shape", choices=sorted(SHAPES), default="qwen3-0.6b", help="of the model")
    add("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS), help="in this order")
    add("--vllm-python", type=Path, help="the interpreter of an environment with vLLM")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="for eagleray serve; may be repeated")
    add("--threads", type=positive_count, default=2, help="of each server; a split divides them")
    add("--port", type=positive_count, default=8123, help="for one server after the other")
    add("--requests", type=positive_count, default=32, help="of each load")
    add("--concurrency", type=positive_count, default=8, help="requests in flight")
    add("--prompt-tokens", type=positive_count, default=512, help="of each request")
    add("--output-tokens", type=positive_count, default=64, help="of each request")
    add("--repeats", type=positive_count, default=2, help="loads on each server; the tables show medians")
    add("--ttft-slo-ms", type=positive, default=5000.0, help="goodput: first token within this")
    add("--tpot-slo-ms", type=positive, default=150.0, help="goodput: time per output token within this")
    add("--timeout-s", type=positive, default=120.0, help="for one answer")
    add("--json", type=Path, help="write everything to this file")
    add("--add", action="store_true", help="keep the loads that the file has already")
    add("--markdown", action="store_true", help="print Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
