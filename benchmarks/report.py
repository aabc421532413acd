"""A report as tables, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from measure import Distribution, Latencies, Report, Throughput
from rich.console import Group, RenderableType
from rich.table import Table
from workload import Workload

_LATENCY_NAMES: Final = {
    "send_delay": "send delay",
    "time_to_first_token": "time to first token",
    "time_per_output_token": "time per output token",
    "inter_token_latency": "inter-token latency",
    "end_to_end": "end to end",
}


@dataclass(frozen=True)
class Section:
    """One table: the first column names, the others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def sections(report: Report, workload: Workload) -> list[Section]:
    """Everything of a report, and how the trace's lengths were changed."""
    shown = [
        Section(("lengths", ""), _scaling_rows(workload)),
        Section(("requests", ""), _request_rows(report)),
        Section(("latency, ms", "mean", "p50", "p95", "p99"), _latency_rows(report.latencies_s)),
        Section(("phase, mean of a request", "ms", "share"), _phase_rows(report)),
        Section(("worker", "requests"), _routing_rows(report)),
    ]
    if report.errors:
        errors = [(kind, str(count)) for kind, count in report.errors.items()]
        shown.insert(2, Section(("error", "requests"), errors))
    return [section for section in shown if section.rows]


def to_terminal(shown: Iterable[Section]) -> RenderableType:
    tables = []
    for section in shown:
        table = Table(*section.header, header_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in section.rows:
            table.add_row(*row)
        tables.append(table)
    return Group(*tables)


def to_markdown(shown: Iterable[Section]) -> str:
    tables = []
    for section in shown:
        rule = ["---", *("---:" for _ in section.header[1:])]
        lines = [section.header, rule, *section.rows]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


def percent(share: float | None) -> str:
    """A dash for what is not there."""
    return "-" if share is None else f"{share:.0%}"


def _scaling_rows(workload: Workload) -> list[tuple[str, str]]:
    scaling, requests = workload.scaling, workload.requests
    prompts = [request.num_prompt_tokens for request in requests]
    outputs = [request.num_output_tokens for request in requests]
    return [
        ("scale", f"{scaling.factor:.4g} (a block of 512 tokens became one of {scaling.block_tokens})"),
        ("cut to the model's limit", f"{scaling.num_cut} of {len(requests)} requests"),
        ("prompt tokens, mean and longest", f"{sum(prompts) / len(prompts):,.0f}, {max(prompts):,}"),
        ("output tokens, mean and longest", f"{sum(outputs) / len(outputs):,.1f}, {max(outputs):,}"),
    ]


def _request_rows(report: Report) -> list[tuple[str, str]]:
    rows = [("completed", f"{report.num_completed} of {report.num_requests}"), *_throughput_rows(report.throughput)]
    if hits := report.prefix_hits:
        rows += [
            ("prefix hits, measured", f"{hits.measured:.3f} of the prompt tokens"),
            (
                "prefix hits, one ideal cache",
                f"{hits.ideal:.3f} ({hits.ideal_unrounded:.3f} before block rounding)",
            ),
        ]
    if goodput := report.goodput:
        rows.append(("goodput", f"{goodput.requests_per_s:.2f} /s ({goodput.share:.1%} of the requests)"))
    return rows


def _throughput_rows(throughput: Throughput) -> list[tuple[str, str]]:
    asked = throughput.requests_per_s_asked
    return [
        ("duration", f"{throughput.duration_s:.1f} s"),
        ("request rate of the schedule", "all at once" if asked is None else f"{asked:.2f} /s"),
        ("request rate, achieved", f"{throughput.requests_per_s:.2f} /s"),
        ("prompt tokens", f"{throughput.prompt_tokens:,} ({throughput.prompt_tokens_per_s:,.0f} /s)"),
        ("output tokens", f"{throughput.output_tokens:,} ({throughput.output_tokens_per_s:,.0f} /s)"),
    ]


def _latency_rows(latencies: Latencies) -> list[tuple[str, ...]]:
    measured: list[tuple[str, Distribution | None]] = [
        (name, getattr(latencies, field)) for field, name in _LATENCY_NAMES.items()
    ]
    return [(name, *map(_milliseconds, (d.mean, d.p50, d.p95, d.p99))) for name, d in measured if d is not None]


def _phase_rows(report: Report) -> list[tuple[str, str, str]]:
    total_s = sum(report.phases_mean_s.values())
    return [(phase, _milliseconds(s), f"{s / total_s:.1%}") for phase, s in report.phases_mean_s.items()]


def _routing_rows(report: Report) -> list[tuple[str, str]]:
    routing = report.routing
    if not routing.decode:
        return []
    workers = [(f"prefill {name}", count) for name, count in routing.prefill.items()]
    workers += [(f"decode {name}", count) for name, count in routing.decode.items()]
    others = [("prefilled where decoded", routing.local_prefills), ("more than one attempt", routing.retried)]
    return [(name, str(count)) for name, count in (*workers, *others)]


def _milliseconds(duration_s: float) -> str:
    return f"{duration_s * 1000:,.1f}"
