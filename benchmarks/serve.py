"""Load any OpenAI-compatible server with requests of one length, and report what clients saw.

    python benchmarks/serve.py --rate 2 --ttft-slo-ms 500 --tpot-slo-ms 50      # open loop, Poisson arrivals
    python benchmarks/serve.py --concurrency 8 --prompt-tokens 512 --output-tokens 64 --token-ids 257 31999

An open loop sends requests when they are due, however slow the server is; a closed one keeps a number of them in
flight. ``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
from collections.abc import Iterator, Sequence

from load import ServerError
from load_run import add_load_arguments, as_json, parse_load_options, positive, positive_count, run_load, show
from measure import Objective
from mooncake import TRACE_BLOCK_TOKENS, TraceRequest


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 when every request was answered whole."""
    options = parse_options(arguments)
    try:
        run = asyncio.run(run_load(options, build_rows(options), objective_of(options)))
    except ServerError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    show(run, _source(options))
    if options.json:
        options.json.write_bytes(as_json(run))
    return run.exit_status


def build_rows(options: argparse.Namespace) -> list[TraceRequest]:
    """Requests that share no prefix, as rows of a trace: the form that the load is built from."""
    blocks = itertools.count()
    num_blocks = -(-options.prompt_tokens // TRACE_BLOCK_TOKENS)
    return [
        TraceRequest(due_ms, options.prompt_tokens, options.output_tokens, tuple(itertools.islice(blocks, num_blocks)))
        for due_ms in itertools.islice(_due_ms(options), options.requests)
    ]


def _due_ms(options: argparse.Namespace) -> Iterator[float]:
    """In a closed loop everything is due at once, and what may be in flight holds it back."""
    random_numbers, now_ms = random.Random(options.seed), 0.0
    while True:
        yield now_ms
        if options.rate is not None:
            is_poisson = options.arrivals == "poisson"
            now_ms += 1000 * (random_numbers.expovariate(options.rate) if is_poisson else 1 / options.rate)


def objective_of(options: argparse.Namespace) -> Objective | None:
    """None when the options name none."""
    if options.ttft_slo_ms is None and options.tpot_slo_ms is None:
        return None
    return Objective(_seconds(options.ttft_slo_ms), _seconds(options.tpot_slo_ms))


def _seconds(duration_ms: float | None) -> float | None:
    return None if duration_ms is None else duration_ms / 1000


def _source(options: argparse.Namespace) -> str:
    arrivals = f"{options.concurrency} at a time" if options.rate is None else f"{options.arrivals}, {options.rate:g}/s"
    return f"{options.requests} requests of {options.prompt_tokens} + {options.output_tokens} tokens, {arrivals}"


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Ends the program with a message for options that cannot be followed, before any request is sent."""
    parser = argparse.ArgumentParser(
        prog="serve.py",
        description="Load an OpenAI-compatible server with requests of one length and report what clients saw.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--requests", type=positive_count, default=32, help="how many")
    add("--prompt-tokens", type=positive_count, default=512, help="of each request")
    add("--output-tokens", type=positive_count, default=64, help="of each request")
    pace = parser.add_mutually_exclusive_group(required=True)
    pace.add_argument("--rate", type=positive, help="open loop: requests per second")
    pace.add_argument("--concurrency", type=positive_count, help="closed loop: requests in flight")
    add("--arrivals", choices=("poisson", "fixed"), default="poisson", help="how the gaps of an open loop are drawn")
    add("--seed", type=int, default=0, help="of the gaps")
    add("--ttft-slo-ms", type=positive, help="goodput counts requests whose first token came within this")
    add("--tpot-slo-ms", type=positive, help="and whose time per output token was within this")
    add_load_arguments(parser, "serve")
    options = parse_load_options(parser, arguments)
    lengths = {"speedup": 1.0, "scale": 1.0, "max_concurrency": options.concurrency or options.requests}
    return argparse.Namespace(**vars(options), **lengths)


if __name__ == "__main__":
    sys.exit(main())
