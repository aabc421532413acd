"""What serving costs beside the model: time added to the first token, processor time per token and per request.

    python benchmarks/overhead.py --json result.json --markdown > result.md

Starts the real service (Ray Serve, ingress, prefill and decode worker, the prefix index's server) with executors that
compute nothing. ``results/README.md`` says how the numbers are meant.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from bare_service import measure_bare
from interference import MAX_OTHERS_SHARE, mark, undisturbed
from measure import Distribution, distribution
from null_engine import MAX_MODEL_TOKENS
from null_service import INDEX, MAX_STREAMS, RAY, DirectEngine, NullService, null_service, request_body
from process_cpu import ProcessUse
from provenance import Provenance, provenance
from report import Section, to_markdown, to_terminal
from rich.console import Console
from stream_load import Job, Window

SHORT_PROMPT: Final = "Say."
LONG_PROMPT: Final = " ".join(["The plane carries tokens."] * 40)
PACED_STREAMS: Final = 16
PACED_STEP_US: Final = 20_000  # 50 tokens/s of each stream
ENDLESS_TOKENS: Final = MAX_MODEL_TOKENS - 4096
CONNECTIONS: Final = 8
GAP_S: Final = 0.01  # between single requests, so that none meets what the one before has left to do
SETTLE_S: Final = 1.0
NUM_SALTS: Final = 2000  # requests of one part that share no cached prefix
DIRECT_REPEATS: Final = 300


@dataclass(frozen=True)
class Part:
    """One thing that is measured. ``direct_prompt``: what the engine alone is asked, to be subtracted."""

    name: str
    new_job: Callable[[NullService, float], Job]
    direct_prompt: str | None = None
    per_token: bool = False
    per_request: bool = False


@dataclass(frozen=True)
class PartResult:
    """What was seen in all rounds, each with the share of the cores that other processes used meanwhile, and the
    engine's own time to a first token where it matters."""

    part: Part
    measured: Sequence[tuple[Window, float]]
    direct_s: float | None

    @property
    def name(self) -> str:
        return f"{self.part.name}{mark(self.others_share)}"

    @property
    def windows(self) -> Sequence[Window]:
        """Those that nobody disturbed; all where there is none."""
        left_alone = [window for window, share in self.measured if share <= MAX_OTHERS_SHARE]
        return left_alone or [window for window, _ in self.measured]

    @property
    def others_share(self) -> float:
        """The most, of the windows that count."""
        shares = [share for _, share in self.measured]
        return max([share for share in shares if share <= MAX_OTHERS_SHARE] or shares)

    @property
    def unit(self) -> str:
        """What use is divided by."""
        return "token" if self.part.per_token else "request"

    def count(self, window: Window) -> int:
        return window.num_tokens if self.part.per_token else window.num_answers

    @property
    def first_event_s(self) -> Distribution:
        measured = distribution(s for window in self.windows for s in window.first_event_s)
        assert measured is not None, f"{self.part.name}: no request was both sent and answered in a window"
        return measured


@dataclass(frozen=True)
class Run:
    """Everything about one run."""

    origin: Provenance
    options: argparse.Namespace
    processes: Mapping[int, str]  # of some names there are several
    parts: Sequence[PartResult]
    bare: Sequence[PartResult]  # the same asked of a service that does nothing but pass letters on

    @property
    def serving(self) -> list[str]:
        """The processes that requests and tokens pass through."""
        return [name for name in self.names if name not in (INDEX, RAY)]

    @property
    def names(self) -> list[str]:
        beside = {INDEX: 1, RAY: 2}
        return sorted(dict.fromkeys(self.processes.values()), key=lambda name: beside.get(name, 0))

    def use(self, window: Window, names: Sequence[str]) -> ProcessUse:
        """Of all processes of these names together."""
        uses = [use for pid, use in window.processes.items() if self.processes[pid] in names]
        return ProcessUse(sum(use.cpu_s for use in uses), sum(use.num_waits for use in uses))

    def cpu_per(self, part: PartResult, count: Callable[[Window], float], names: Sequence[str]) -> float:
        """Median over the rounds of processor seconds per counted thing."""
        return statistics.median(self.use(window, names).cpu_s / count(window) for window in part.windows)

    def beyond_idle(self, part: PartResult, name: str) -> tuple[float, float]:
        """Medians of (processor seconds, waits) per token or request, less what the process needs when nothing is
        asked."""
        idle = next(other for other in self.parts if other.part is IDLE)
        idle_uses = [(self.use(window, [name]), window.duration_s) for window in idle.windows]
        idle_cpu = statistics.median(use.cpu_s / duration_s for use, duration_s in idle_uses)
        idle_waits = statistics.median(use.num_waits / duration_s for use, duration_s in idle_uses)
        uses = [(self.use(window, [name]), window.duration_s, part.count(window)) for window in part.windows]
        return (
            statistics.median((use.cpu_s - idle_cpu * duration_s) / count for use, duration_s, count in uses),
            statistics.median((use.num_waits - idle_waits * duration_s) / count for use, duration_s, count in uses),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    run = measure(options)
    others_share = max(part.others_share for part in (*run.parts, *run.bare))
    title = (
        f"{run.origin.num_cores} x {run.origin.cpu}, commit {run.origin.git_commit}, {run.origin.date}; others used at "
        f"most {others_share:.1%} of the cores{mark(others_share)}"
    )
    shown = sections(run)
    if options.markdown:
        print(f"{title}\n\n{to_markdown(shown)}")
    else:
        Console().print(title, to_terminal(shown), sep="\n", highlight=False, markup=False)
    if options.json:
        options.json.write_bytes(_as_json(run))
    return 0


def measure(options: argparse.Namespace) -> Run:
    """All parts one after the other, and so again for each round: what drifts meets all of them alike."""
    origin = provenance()
    direct = DirectEngine()
    asked = {part.direct_prompt for part in PARTS if part.direct_prompt is not None}
    direct_s = {
        prompt: statistics.median(direct.first_token_s(prompt) for _ in range(DIRECT_REPEATS)) for prompt in asked
    }
    measured: dict[str, list[tuple[Window, float]]] = {part.name: [] for part in PARTS}
    bare: dict[str, list[tuple[Window, float]]] = {part.name: [] for part in BARE_PARTS}
    with null_service() as service:
        for _ in range(options.rounds):
            for part in PARTS:
                job = part.new_job(service, options.window_s)
                # The service's processes are below this one, and so is the client.
                measured[part.name].append(undisturbed(partial(service.measure, job), tree_pid=os.getpid()))
                if part in BARE_PARTS:
                    bare[part.name].append(undisturbed(partial(measure_bare, job), tree_pid=os.getpid()))
        processes = service.processes
    results = [
        PartResult(part, measured[part.name], direct_s[part.direct_prompt] if part.direct_prompt else None)
        for part in PARTS
    ]
    bare_results = [PartResult(part, bare[part.name], None) for part in BARE_PARTS]
    return Run(origin, options, processes, results, bare_results)


# ---- the parts


def _idle(service: NullService, window_s: float) -> Job:
    """One request, and then nothing."""
    job = _job(service, SHORT_PROMPT, num_tokens=1, num_bodies=1, window_s=window_s)
    return msgspec.structs.replace(job, num_rounds=1)


def _single(prompt: str) -> Callable[[NullService, float], Job]:
    def new_job(service: NullService, window_s: float) -> Job:
        job = _job(service, prompt, num_tokens=1, num_bodies=NUM_SALTS, window_s=window_s)
        return msgspec.structs.replace(job, gap_s=GAP_S)

    return new_job


def _requests(service: NullService, window_s: float) -> Job:
    job = _job(service, SHORT_PROMPT, num_tokens=1, num_bodies=NUM_SALTS, window_s=window_s)
    return msgspec.structs.replace(job, num_connections=CONNECTIONS)


def _streams(num_streams: int, step_us: int) -> Callable[[NullService, float], Job]:
    def new_job(service: NullService, window_s: float) -> Job:
        job = _job(service, SHORT_PROMPT, ENDLESS_TOKENS, num_streams, window_s, step_us)
        return msgspec.structs.replace(job, num_connections=num_streams)

    return new_job


IDLE: Final = Part("idle", _idle)
FIRST_TOKEN: Final = Part("first token, one worker", _single(SHORT_PROMPT), direct_prompt=SHORT_PROMPT)
PACED: Final = Part(f"{PACED_STREAMS} streams of 50 tokens/s", _streams(PACED_STREAMS, PACED_STEP_US), per_token=True)
PARTS: Final = (
    IDLE,
    FIRST_TOKEN,
    Part("first token, split over two workers", _single(LONG_PROMPT), direct_prompt=LONG_PROMPT),
    Part(f"requests of one token, {CONNECTIONS} at once", _requests, per_request=True),
    PACED,
    Part(f"{MAX_STREAMS} streams, as fast as they go", _streams(MAX_STREAMS, 0), per_token=True),
)
BARE_PARTS: Final = (FIRST_TOKEN, PACED)  # what one hop and one event loop take at the least


def _job(service: NullService, prompt: str, num_tokens: int, num_bodies: int, window_s: float, step_us: int = 0) -> Job:
    bodies = tuple(request_body(service.model, prompt, num_tokens, step_us, str(salt)) for salt in range(num_bodies))
    return Job(
        host="", port=0, pids=(), path="/v1/chat/completions", bodies=bodies, num_connections=1, settle_s=SETTLE_S,
        window_s=window_s,
    )  # fmt: skip


# ---- what is shown


def sections(run: Run) -> list[Section]:
    serving = run.serving
    beside = [name for name in run.names if name not in serving]
    return [
        Section(("first token, ms", "p50", "p95", "engine alone", "added, p50", "added, p95"), _first_rows(run)),
        Section(("where a first token's time goes, mean ms", *STAGES, "first event"), _stage_rows(run)),
        Section(("processor time", "all that serve", *serving, *beside, "client"), _cpu_rows(run)),
        Section(("beyond idle", *run.names), _beyond_idle_rows(run)),
        Section(("a bare service of two processes", "p50, ms", "p95, ms", "us per token"), _bare_rows(run)),
        Section(("counts", "tokens/s", "tokens per event", "bytes per token", "waits per 1,000 tokens"), _counts(run)),
    ]


def _first_rows(run: Run) -> list[Sequence[str]]:
    return [
        (part.name, *map(_ms, (first.p50, first.p95, own_s, first.p50 - own_s, first.p95 - own_s)))
        for part in run.parts
        if (own_s := part.direct_s) is not None and (first := part.first_event_s)
    ]


# From the server's account, but for what lies outside it: an answer's end comes as long after the account was closed
# as the first event comes after it was written.
STAGES: Final[Mapping[str, Callable[[Window], float]]] = {
    "outside the account": lambda window: statistics.fmean(window.answer_s) - window.accounts_s["total_s"],
    "read": lambda window: window.accounts_s["queue.read_s"],
    "routed": lambda window: window.accounts_s["queue.route_s"],
    "decode accepts": lambda window: window.accounts_s["queue.decode_accept_s"],
    "prefill accepts": lambda window: window.accounts_s["queue.prefill_accept_s"],
    "step begins": lambda window: window.accounts_s["queue.first_step_s"],
    "token said": lambda window: window.accounts_s["prefill_s"],
    "received": lambda window: window.accounts_s["network_s"],
    "written": lambda window: (
        statistics.fmean(window.first_event_s)
        - statistics.fmean(window.answer_s)
        + window.accounts_s["total_s"]
        - window.accounts_s["time_to_first_token_s"]
    ),
}


def _stage_rows(run: Run) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for part in run.parts:
        if part.direct_s is not None:
            stages_s = [statistics.fmean(map(stage, part.windows)) for stage in STAGES.values()]
            first_event_s = statistics.fmean(statistics.fmean(window.first_event_s) for window in part.windows)
            rows.append((part.name, *map(_ms, (*stages_s, first_event_s))))
    return rows


def _cpu_rows(run: Run) -> list[Sequence[str]]:
    groups = [run.serving, *([name] for name in run.names)]
    rows: list[Sequence[str]] = []
    for part in run.parts:
        if part.part is IDLE:
            shares = [run.cpu_per(part, lambda window: window.duration_s, names) for names in groups]
            rows.append(("idle, ms per second", *(f"{1e3 * s:.1f}" for s in shares), "-"))
        elif part.part.per_token or part.part.per_request:
            shares = [run.cpu_per(part, part.count, names) for names in groups]
            shares.append(statistics.median(window.client_cpu_s / part.count(window) for window in part.windows))
            rows.append((f"{part.name}, {_use_unit(part)}", *(_cpu(part, s) for s in shares)))
    return rows


def _beyond_idle_rows(run: Run) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for part in run.parts:
        if part.part is not IDLE:
            cpu_s, waits = zip(*(run.beyond_idle(part, name) for name in run.names), strict=True)
            rows.append((f"{part.name}, {_use_unit(part)}", *(_cpu(part, s) for s in cpu_s)))
            rows.append((f"{part.name}, waits per {part.unit}", *(f"{round(count, 2) + 0.0:.2f}" for count in waits)))
    return rows


def _bare_rows(run: Run) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for part in run.bare:
        if part.part.per_token:
            cpu_s = [sum(use.cpu_s for use in window.processes.values()) / window.num_tokens for window in part.windows]
            rows.append((part.name, "-", "-", f"{1e6 * statistics.median(cpu_s):.1f}"))
        else:
            first = part.first_event_s
            rows.append((part.name, _ms(first.p50), _ms(first.p95), "-"))
    return rows


def _use_unit(part: PartResult) -> str:
    return f"us per {part.unit}" if part.part.per_token else f"ms per {part.unit}"


def _cpu(part: PartResult, seconds: float) -> str:
    if part.part.per_token:
        return f"{round(1e6 * seconds, 1) + 0.0:.1f}"
    return f"{round(1e3 * seconds, 2) + 0.0:.2f}"  # 0.0 more: no "-0.00"


def _counts(run: Run) -> list[Sequence[str]]:
    return [
        (
            part.name,
            f"{sum(window.num_tokens / window.duration_s for window in part.windows) / len(part.windows):,.0f}",
            f"{sum(window.num_tokens for window in part.windows) / sum(w.num_events for w in part.windows):.2f}",
            f"{sum(window.num_bytes for window in part.windows) / sum(w.num_tokens for w in part.windows):.0f}",
            f"{1000 * _num_waits(run, part) / sum(w.num_tokens for w in part.windows):.0f}",
        )
        for part in run.parts
        if part.part.per_token
    ]


def _num_waits(run: Run, part: PartResult) -> int:
    return sum(run.use(window, run.serving).num_waits for window in part.windows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _as_json(run: Run) -> bytes:
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(run.options).items()}
    everything = {
        "provenance": asdict(run.origin),
        "options": options,
        "processes": run.processes,
        "parts": [_part_as_json(part) for part in run.parts],
        "bare": [_part_as_json(part) for part in run.bare],
    }
    return msgspec.json.format(msgspec.json.encode(everything)) + b"\n"


def _part_as_json(part: PartResult) -> dict[str, Any]:
    return {
        "name": part.part.name,
        "engine_alone_s": part.direct_s,
        "windows": [window for window, _ in part.measured],
        "others_shares": [share for _, share in part.measured],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="overhead.py",
        description="Measure what serving costs beside the model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--window-s", type=float, default=5.0, help="how long each part is measured, in each round")
    parser.add_argument("--rounds", type=int, default=3, help="how often; medians are shown")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--markdown", action="store_true", help="print the report as Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
