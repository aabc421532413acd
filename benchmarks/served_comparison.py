"""What a comparison of servers found: every load, and the tables made of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from floors import Machine
from provenance import Provenance
from report import Section


class Load(msgspec.Struct, frozen=True):
    """One load on one server."""

    server: str
    round: int
    start_s: float  # from the start of its process until it answered
    has_tcmalloc: bool
    between_turns: str  # what the server does then
    others_share: float  # of the cores, what neither the server nor the client used
    idle_share: float  # of that, what servers used that were alive and had no turn
    is_kept: bool  # others used little enough
    run: dict[str, Any]  # as ``serve.py --json`` writes it


@dataclass(frozen=True)
class ServedComparison:
    """Everything about one comparison, which may have been made in pieces."""

    origins: Sequence[Provenance]
    loads: Sequence[Load]
    failures: Mapping[str, str]  # server -> why it was not measured, or no further
    machine: Machine  # beside the newest loads
    limit_tokens_per_s: float  # of output, that this machine allows


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
    """Medians and spread of the loads of each server; how many times better each of ours is; what stands behind."""
    all_loads: dict[str, list[Load]] = {}
    for load in found.loads:
        all_loads.setdefault(load.server, []).append(load)
    loads = {_shown_name(server, its): _counted(its) for server, its in all_loads.items()}
    values = {server: [_read(its, read) for read, _ in _COLUMNS.values()] for server, its in loads.items()}
    medians = {server: [statistics.median(column) for column in its] for server, its in values.items()}
    rate = list(_COLUMNS).index("output tokens/s")
    limit = f"of the limit, {found.limit_tokens_per_s:,.0f} tokens/s"
    rows = [
        (server, *map(_with_spread, its), f"{medians[server][rate] / found.limit_tokens_per_s:.0%}")
        for server, its in values.items()
    ]
    shown = [Section(("server: median (least to most)", *_COLUMNS, limit), rows)]
    for ours in (server for server in medians if server.startswith("eagleray")):
        peers = [(peer, *_times_better(medians[ours], row)) for peer, row in medians.items() if peer != ours]
        shown.append(Section((f"{ours}, times as good as", *_COLUMNS), peers))
    shown.append(_phases(loads))
    shown.append(Section(_BEHIND, [_behind(server, its) for server, its in all_loads.items()]))
    failures = [(name, " ".join(why.split())) for name, why in found.failures.items()]
    shown.append(Section(("not measured, or no further", "why"), failures))
    return [section for section in shown if section.rows]


def _counted(loads: Sequence[Load]) -> Sequence[Load]:
    """Those that nobody disturbed; all, where there is none."""
    return [load for load in loads if load.is_kept] or loads


def _shown_name(server: str, loads: Sequence[Load]) -> str:
    return server if any(load.is_kept for load in loads) else f"{server}, disturbed"


def _read(loads: Sequence[Load], read: Callable[[Mapping[str, Any]], float]) -> list[float]:
    return [read(load.run["report"]) for load in loads]


def _phases(loads: Mapping[str, Sequence[Load]]) -> Section:
    """Where a request's time went, of servers that account for it: ours."""
    accounts = {server: [load.run["report"]["phases_mean_s"] for load in its] for server, its in loads.items()}
    told = {server: its for server, its in accounts.items() if all(its)}
    names = list(dict.fromkeys(name for its in told.values() for account in its for name in account))
    rows = [
        (server, *(_with_spread([1000 * account.get(name, 0.0) for account in its]) for name in names))
        for server, its in told.items()
    ]
    return Section(("phase of a request, mean, ms: median (least to most)", *names), rows)


_BEHIND: Final = (
    "server", "start, s", "tcmalloc", "between turns", "kept", "discarded", "completed", "others at most",
    "of them idle servers",
)  # fmt: skip


def _behind(server: str, loads: Sequence[Load]) -> tuple[str, ...]:
    last, counted, reports = loads[-1], _counted(loads), [load.run["report"] for load in loads]
    completed, asked = (sum(report[key] for report in reports) for key in ("num_completed", "num_requests"))
    num_kept = sum(load.is_kept for load in loads)
    return (
        server,
        f"{last.start_s:.0f}",
        "yes" if last.has_tcmalloc else "no",
        last.between_turns,
        str(num_kept),
        str(len(loads) - num_kept),
        f"{completed} of {asked}",
        f"{max(load.others_share for load in counted):.1%}",
        f"{max(load.idle_share for load in counted):.1%}",
    )


def _with_spread(values: Sequence[float]) -> str:
    median = _figure(statistics.median(values))
    return f"{median} ({_figure(min(values))} to {_figure(max(values))})" if len(values) > 1 else median


def _figure(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def _times_better(ours: Sequence[float], theirs: Sequence[float]) -> list[str]:
    """Above 1 is better for us, in every column."""
    signs = [sign for _, sign in _COLUMNS.values()]
    pairs = zip(ours, theirs, signs, strict=True)
    return [f"{(our / their) ** sign:.2f}" if our and their else "-" for our, their, sign in pairs]
