"""Replay a request trace against a running server, on schedule, and report what clients saw.

    python benchmarks/replay.py --trace conversation_trace.jsonl.gz --requests 60 --speedup 0.5
    python benchmarks/replay.py --requests 200 --seed 1 --json result.json      # made-up requests, no file needed

Lengths are scaled to the served model. ``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from load import ServerError
from load_run import add_load_arguments, as_json, count, parse_load_options, positive, positive_count, run_load, show
from mooncake import TraceError, TraceRequest, generate_trace, read_trace


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 when every request was answered whole."""
    options = parse_options(arguments)
    try:
        run = asyncio.run(run_load(options, _rows(options)))
    except (TraceError, ServerError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    show(run, _source(options, run.result.num_requests))
    if options.json:
        options.json.write_bytes(as_json(run))
    return run.exit_status


def _source(options: argparse.Namespace, num_requests: int) -> str:
    source = options.trace.name if options.trace else f"generated, seed {options.seed}"
    return f"{source}, requests {options.start} to {options.start + num_requests - 1}, speed x{options.speedup:g}"


def _rows(options: argparse.Namespace) -> list[TraceRequest]:
    if options.trace is not None:
        return read_trace(options.trace, options.start, options.requests)
    return generate_trace(options.start + options.requests, options.seed)[options.start :]


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Ends the program with a message for options that cannot be followed, before any request is sent."""
    parser = argparse.ArgumentParser(
        prog="replay.py",
        description="Replay a request trace against a running server and report what clients saw.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--trace", type=Path, help=".jsonl or .jsonl.gz in Mooncake's format; without: requests like its statistics")
    add("--seed", type=int, default=0, help="of the requests that are made up")
    add("--start", type=count, default=0, help="first request of the trace, from 0")
    add("--requests", type=positive_count, default=100, help="how many, at most")
    add("--speedup", type=positive, default=1.0, help="2: twice as fast as recorded; 0.5: half as fast")
    add("--scale", type=positive, help="factor on all lengths; without: the largest that fits the model, at most 1")
    add("--max-concurrency", type=positive_count, default=128, help="requests in flight; more wait in the client")
    add_load_arguments(parser, "replay")
    return parse_load_options(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
