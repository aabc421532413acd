"""``eagleray status``: a running server's pools and workers."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from typing import Final

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from eagleray.cli.client import ApiClient, ServerUnreachable, add_client_arguments, client_from
from eagleray.cli.terminal import bar, format_bytes, format_ms
from eagleray.core.clock import SystemClock
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.router.service import ServiceStatus

WATCH_INTERVAL_S: Final = 1.0
COLUMNS: Final = (
    "role", "worker", "waiting", "running", "reserved", "KV in use", "cached", "prefill", "decode step", "preempted",
    "transferred",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_arguments(parser)
    parser.add_argument(
        "--watch", nargs="?", type=_interval, const=WATCH_INTERVAL_S, metavar="SECONDS",
        help="keep showing it, every second or so often; Ctrl-C ends",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as the server reports it")


def run(arguments: argparse.Namespace) -> int:
    with client_from(arguments, SystemClock()) as client:
        if arguments.json:
            print(msgspec.json.format(client.status_report()).decode())
        elif arguments.watch is None:
            _console().print(render(client.url, client.status()))
        else:
            _watch(client, arguments.watch)
    return 0


def render(url: str, status: ServiceStatus) -> RenderableType:
    """One line about the service, one row per worker, prefill pool first, and one line per worker that guesses."""
    return Group(_headline(url, status), _worker_table(status.workers), *_guessing(status.workers))


def _headline(url: str, status: ServiceStatus) -> Text:
    pools = [f"{sum(worker.role is role for worker in status.workers)} {role.value}" for role in Role]
    state = Text("ready", "green") if status.ready else Text(f"not ready: {status.reason}", "red")
    return Text.assemble(
        f"{url}  ", state, f"  workers: {' + '.join(pools)}  queued: {status.num_queued}  "
        f"running: {status.num_running}  index: {status.prefix_index or '-'}",
    )  # fmt: skip


def _in_order(workers: tuple[WorkerSnapshot, ...]) -> list[WorkerSnapshot]:
    return sorted(workers, key=lambda worker: (worker.role is Role.DECODE, worker.worker_id))


def _worker_table(workers: tuple[WorkerSnapshot, ...]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("role", "worker", "KV in use") else "right", no_wrap=True)
    for worker in _in_order(workers):
        table.add_row(*_row(worker))
    return table


def _row(worker: WorkerSnapshot) -> tuple[str, ...]:
    leases = worker.num_handed_over if worker.role is Role.PREFILL else worker.num_reserved
    occupancy = worker.kv_occupancy
    return (
        worker.role.value,
        worker.worker_id,
        str(worker.num_waiting),
        str(worker.num_running),
        str(leases),
        f"{bar(occupancy)} {occupancy:4.0%}",
        str(worker.blocks_cached),
        f"{worker.prefill_tokens_per_s:,.0f} tok/s" if worker.prefill_tokens_per_s else "-",
        format_ms(worker.decode_step_s) if worker.decode_step_s else "-",
        str(worker.num_preemptions),
        format_bytes(worker.transfer_bytes_total),
    )


def _guessing(workers: tuple[WorkerSnapshot, ...]) -> Iterator[Text]:
    """What guessing has brought since each worker started."""
    for worker in _in_order(workers):
        acceptance = worker.acceptance
        if acceptance is None or not acceptance.num_steps:
            continue
        rates = " ".join(f"{rate:.0%}" for rate in acceptance.rate_per_position) or "-"
        share = acceptance.num_drafts / acceptance.num_steps
        yield Text(
            f"{worker.worker_id}  {acceptance.tokens_per_step:.2f} tokens per step, "
            f"{acceptance.acceptance_length:.2f} in the {share:.0%} with guesses; "
            f"{acceptance.num_accepted_tokens:,} of {acceptance.num_draft_tokens:,} accepted, by position {rates}; "
            f"verifying {acceptance.verify_s:,.1f} s, guessing {acceptance.draft_s:,.1f} s"
        )


def _watch(client: ApiClient, interval_s: float) -> None:
    """Until Ctrl-C. A server that goes away is waited for."""
    pause = threading.Event()
    try:
        with Live(console=_console(), auto_refresh=False, screen=sys.stdout.isatty()) as live:
            while True:
                try:
                    live.update(render(client.url, client.status()), refresh=True)
                except ServerUnreachable as error:
                    live.update(Text(str(error), "red"), refresh=True)
                pause.wait(interval_s)
    except KeyboardInterrupt:
        return


def _console() -> Console:
    """As wide as the table needs where no terminal says how wide it is."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0.1 and 3600 seconds")
    return seconds
