"""Servers in turn on one machine, under one load: eagleray's and vLLM's, aggregated and split.

    python benchmarks/compare_served.py --folder models --vllm-python vllm/bin/python --json result.json

They are loaded one after the other, A B C A B C, by the load generator of ``serve.py``. vLLM takes a minute to start:
it is started once, and stopped by a signal between its turns. Ours are started anew for each: an idle Ray uses several
percent of the cores, and does not bear being stopped. Where memory does not hold all of vLLM's, ``--restart`` starts
these anew as well. A split has as many threads as the others: the two workers of ours take turns on them, the two of
vLLM divide them. The file is written after every turn. ``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
from driver import end_on_sigterm
from floors import Machine, in_child, measure_machine, shortest_load_s
from interference import MAX_OTHERS_SHARE, Trees, attempts
from load import ServerError
from load_run import as_dict, positive, positive_count, run_load
from provenance import provenance
from random_checkpoint import FIRST_TEXT_TOKEN_ID, SHAPES, checkpoint_folder
from report import to_markdown, to_terminal
from rich.console import Console
from serve import build_rows, objective_of, parse_options
from served_comparison import Load, ServedComparison, served_sections
from servers import SERVERS, Running, Server, StartError, running

from eagleray.models.registry import load_model_config

NOT_NAMED: Final = "not named in --servers"
_DTYPE: Final = "bfloat16"  # of all servers
_PORTS_EACH: Final = 10  # vllm-split takes five
_SETTLE_S: Final = 1.0  # connections that timed out while a server stood still are closed first


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every server that was asked for could be measured to the end."""
    options = _parser().parse_args(arguments)
    before = _read_before(options)

    def keep(found: ServedComparison) -> None:
        if options.json:
            joined = found if before is None else _joined(before, found)
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(joined)) + b"\n")

    found = asyncio.run(_measure(options, keep))
    keep(found)
    _show(found if before is None else _joined(before, found), options)
    return 1 if found.failures.keys() & set(options.servers) else 0


def _read_before(options: argparse.Namespace) -> ServedComparison | None:
    if options.add and options.json.exists():
        return msgspec.json.decode(options.json.read_bytes(), type=ServedComparison)
    return None


def _joined(before: ServedComparison, found: ServedComparison) -> ServedComparison:
    """Of a server that was measured, only what stopped it in the newer piece is worth a reason."""
    measured = {load.server for load in (*before.loads, *found.loads)}
    failures = {name: why for name, why in {**before.failures, **found.failures}.items() if name not in measured}
    failures |= {name: why for name, why in found.failures.items() if why != NOT_NAMED}
    return replace(
        found,
        origins=[*before.origins, *found.origins],
        loads=[*before.loads, *found.loads],
        failures=failures,
    )


async def _measure(options: argparse.Namespace, keep: Callable[[ServedComparison], None]) -> ServedComparison:
    """``keep`` gets what there is after every turn."""
    checkpoint = checkpoint_folder(options.shape, options.folder)
    machine = in_child(measure_machine, _DTYPE, options.threads)
    limit_tokens_per_s = _limit_tokens_per_s(checkpoint, machine, options)
    failures = {name: NOT_NAMED for name in SERVERS if name not in options.servers}
    found = ServedComparison([provenance()], [], failures, machine, limit_tokens_per_s)
    end_on_sigterm()
    async with AsyncExitStack() as stack:
        servers = Servers(checkpoint, options, stack)
        failures |= await servers.start(options.servers)
        for round_number, name in turns(options.servers, options.repeats):
            if name not in failures:
                try:
                    loads = await _turn(name, round_number, servers, options)
                    found = replace(found, loads=[*found.loads, *loads])
                except (StartError, ServerError) as error:
                    failures[name] = str(error)
                    _say(f"{name}: {error}")
                keep(found)
    return found


def turns(names: Sequence[str], num_rounds: int) -> Iterator[tuple[int, str]]:
    """A B C A B C, with the number of the round."""
    for round_number in range(1, num_rounds + 1):
        for name in names:
            yield round_number, name


class Servers:
    """Those that can be stopped are started once and stopped between their turns; others, and all with ``--restart``,
    are started anew for each."""

    def __init__(self, checkpoint: Path, options: argparse.Namespace, stack: AsyncExitStack) -> None:
        self._checkpoint, self._options, self._stack = checkpoint, options, stack
        self._alive: dict[str, Running] = {}

    async def start(self, names: Sequence[str]) -> dict[str, str]:
        """Those that live until the stack closes. Returns why some could not be built or started."""
        failures = {}
        for name in names:
            try:
                server = self._build(name)
                if server.can_be_stopped and not self._options.restart:
                    _say(f"starting {name}")
                    started = await self._stack.enter_async_context(running(server))
                    try:
                        await _warm_up(self._options, server.port)
                    finally:
                        started.stop()
                    self._alive[name] = started
            except (StartError, ServerError) as error:
                failures[name] = str(error)
                _say(f"{name}: {error}")
        return failures

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[Running]:
        """Raises ``StartError``."""
        if name not in self._alive:
            async with running(self._build(name)) as server:
                yield server
            return
        server = self._alive[name]
        server.resume()
        try:
            await asyncio.sleep(_SETTLE_S)
            yield server
        finally:
            server.stop()

    def idle(self, busy: Running) -> Trees:
        return Trees([server.pid for server in self._alive.values() if server is not busy])

    def between_turns(self, name: str) -> str:
        return "stopped" if name in self._alive else "restarted"

    def _build(self, name: str) -> Server:
        port = self._options.port + _PORTS_EACH * list(SERVERS).index(name)
        return SERVERS[name](self._checkpoint, self._options, port)


async def _turn(name: str, round_number: int, servers: Servers, options: argparse.Namespace) -> list[Load]:
    """One load that nobody disturbed, before it those that somebody did; or only such. Raises ``StartError`` and
    ``ServerError``."""
    loads: list[Load] = []
    async with servers.turn(name) as server:
        await _warm_up(options, server.server.port)  # what a load makes use of is there again
        for attempt in attempts(MAX_OTHERS_SHARE, server.pid):
            idle = servers.idle(server)
            run = await _one_load(options, server.server.port, options.requests, _pace(options))
            idle_share, others_share = idle.share(), attempt.end()
            is_kept = others_share <= MAX_OTHERS_SHARE
            loads.append(
                Load(
                    name, round_number, server.start_s, server.has_tcmalloc, servers.between_turns(name),
                    others_share, idle_share, is_kept, run,
                )
            )  # fmt: skip
            rate = run["report"]["throughput"]["output_tokens_per_s"]
            state = "" if is_kept else ", discarded"
            _say(f"round {round_number}, {name}: {rate:,.1f} tokens/s, others {others_share:.1%}{state}")
    return loads


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _limit_tokens_per_s(checkpoint: Path, machine: Machine, options: argparse.Namespace) -> float:
    load_s = shortest_load_s(
        load_model_config(checkpoint), _DTYPE, machine, requests=options.requests, concurrency=options.concurrency,
        prompt=options.prompt_tokens, output=options.output_tokens,
    )  # fmt: skip
    limit_tokens_per_s = float(options.requests * options.output_tokens / load_s)
    return limit_tokens_per_s if options.rate is None else min(limit_tokens_per_s, options.rate * options.output_tokens)


def _pace(options: argparse.Namespace) -> dict[str, float]:
    return {"concurrency": options.concurrency} if options.rate is None else {"rate": options.rate}


async def _warm_up(options: argparse.Namespace, port: int) -> None:
    await _one_load(options, port, options.concurrency, {"concurrency": options.concurrency})


async def _one_load(
    options: argparse.Namespace, port: int, num_requests: int, pace: Mapping[str, float]
) -> dict[str, Any]:
    """Every time under a salt of its own, so that no prefix is found."""
    asked = {
        "url": f"http://127.0.0.1:{port}",
        "requests": num_requests,
        **pace,
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
    pace = f"{options.concurrency} at a time" if options.rate is None else f"{options.rate:g}/s as they come (Poisson)"
    title = (
        f"{options.shape} (random weights), {options.requests} requests of {options.prompt_tokens} + "
        f"{options.output_tokens} tokens, {pace}, {options.threads} threads on "
        f"{origin.num_cores} x {origin.cpu}, commit {origin.git_commit}, {origin.date}; good: first token within "
        f"{options.ttft_slo_ms:g} ms and {options.tpot_slo_ms:g} ms per token after it"
    )
    shown = served_sections(found)
    if options.markdown:
        print(f"{title}\n\n{to_markdown(shown)}")
    else:
        Console().print(title, to_terminal(shown), sep="\n", highlight=False, markup=False)


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
    add("--threads", type=positive_count, default=2, help="of each server; a split shares them")
    add("--port", type=positive_count, default=8123, help="of the first server; others take higher ones")
    add("--requests", type=positive_count, default=32, help="of each load")
    add("--concurrency", type=positive_count, default=8, help="requests in flight; of the warm-up, with --rate")
    add("--rate", type=positive, help="open loop instead: requests per second, in Poisson arrivals")
    add("--prompt-tokens", type=positive_count, default=512, help="of each request")
    add("--output-tokens", type=positive_count, default=64, help="of each request")
    add("--repeats", type=positive_count, default=3, help="rounds; the tables show medians and spread")
    add("--restart", action="store_true", help="start every server anew for its turn: where memory does not hold all")
    add("--kv-gib", type=positive_count, default=1, help="memory for keys and values of each worker, in GiB")
    add("--ttft-slo-ms", type=positive, default=5000.0, help="goodput: first token within this")
    add("--tpot-slo-ms", type=positive, default=150.0, help="goodput: time per output token within this")
    add("--timeout-s", type=positive, default=120.0, help="for one answer")
    add("--json", type=Path, help="write everything to this file")
    add("--add", action="store_true", help="keep the loads that the file has already")
    add("--markdown", action="store_true", help="print Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
