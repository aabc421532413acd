"""What a comparison of engines found: every measurement, and the tables made of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from floors import Machine, Work
from provenance import Provenance
from report import Section, percent

_OURS: Final = "eagleray"


@dataclass(frozen=True)
class Case:
    """What is asked of an engine at once."""

    kind: str  # "prefill" or "decode"
    batch: int
    prompt_tokens: int
    output_tokens: int

    @property
    def name(self) -> str:
        return f"prefill {self.prompt_tokens}" if self.kind == "prefill" else f"decode {self.batch}"


@dataclass(frozen=True)
class Measurement:
    """One timing of one engine."""

    contender: str
    dtype: str  # of the products that it is held against
    round: int
    case: Case
    duration_s: float  # of the whole case
    first_token_s: float  # of an equal case with one output token, measured just before; 0 for prefill
    others_share: float  # of the cores, what other processes used meanwhile
    is_kept: bool  # they used little enough
    work: Work  # of the prefill, or of the middle one of the decoding steps

    @property
    def tokens_per_s(self) -> float:
        """Prefill: prompt tokens until the first output token. Decode: output tokens after the first ones."""
        if self.case.kind == "prefill":
            return self.case.prompt_tokens / self.duration_s
        return self.case.batch * (self.case.output_tokens - 1) / (self.duration_s - self.first_token_s)

    def floor_tokens_per_s(self, machine: Machine) -> float:
        tokens = self.case.prompt_tokens if self.case.kind == "prefill" else self.case.batch
        return tokens / machine.floor_s(self.work)


@dataclass(frozen=True)
class Piece:
    """One run of the command."""

    origin: Provenance
    shape: str
    num_threads: int
    machines: Mapping[str, Machine]  # by dtype of the products
    engines: Mapping[str, Any]  # by contender: what its driver said (version, settings, start_s), and how it ran
    not_measured: Mapping[str, str]  # contender -> why
    measurements: Sequence[Measurement]


@dataclass(frozen=True)
class Comparison:
    """All pieces are of one shape and one machine."""

    pieces: Sequence[Piece]

    def machine(self, dtype: str) -> Machine:
        """The best that any piece saw: a floor is what the machine can do."""
        machines = [machine for piece in self.pieces for machine in piece.machines.values()]
        multiplied = [piece.machines[dtype].flop_per_s for piece in self.pieces if dtype in piece.machines]
        return Machine(max(machine.read_bytes_per_s for machine in machines), max(multiplied))

    def title(self) -> str:
        last = self.pieces[-1]
        origin = last.origin
        dtypes = dict.fromkeys(dtype for piece in self.pieces for dtype in piece.machines)
        machines = {dtype: self.machine(dtype) for dtype in dtypes}
        multiplied = ", ".join(f"{found.flop_per_s / 1e12:.2f} TFLOP/s in {dtype}" for dtype, found in machines.items())
        read = max(found.read_bytes_per_s for found in machines.values())
        return (
            f"{last.shape} (random weights), {last.num_threads} threads on {origin.num_cores} x {origin.cpu}, "
            f"commit {origin.git_commit}, {origin.date}; the machine reads {read / 1e9:.1f} GB/s and multiplies "
            f"{multiplied}. Comparisons count from this report; our own share of the floor counts from engine.py's."
        )

    def kept(self) -> dict[str, dict[str, list[Measurement]]]:
        """Undisturbed measurements by contender and name of the case."""
        kept: dict[str, dict[str, list[Measurement]]] = {}
        for measurement in self.measurements:
            if measurement.is_kept:
                cases = kept.setdefault(measurement.contender, {})
                cases.setdefault(measurement.case.name, []).append(measurement)
        return kept

    @property
    def measurements(self) -> list[Measurement]:
        return [measurement for piece in self.pieces for measurement in piece.measurements]


def read_comparison(file: Path) -> Comparison:
    return msgspec.json.decode(file.read_bytes(), type=Comparison)


def write_comparison(file: Path, comparison: Comparison) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(comparison)) + b"\n")


def sections(comparison: Comparison) -> list[Section]:
    """Speeds beside what the machine allows, ours over each peer's, and what stands behind the figures."""
    kept = comparison.kept()
    cases = list(dict.fromkeys(measurement.case.name for measurement in comparison.measurements))
    shown = [
        Section(("tokens/s (share of the floor)", *cases), _speed_rows(comparison, cases)),
        Section(("tokens/s, slowest to fastest", *cases), _spread_rows(comparison, cases)),
    ]
    for ours in filter(_is_ours, kept):
        rows = [_ratios(comparison, ours, peer, cases) for peer in kept if peer != ours]
        shown.append(Section((f"{ours}, times as fast as", *cases), [row for row in rows if set(row[1:]) != {"-"}]))
    shown.append(Section(_RUN_HEADER, _runs(comparison)))
    absent = {name: why for piece in comparison.pieces for name, why in piece.not_measured.items() if name not in kept}
    shown.append(
        Section(("not measured", "why"), [(name, " ".join(why.split())[-160:]) for name, why in absent.items()])
    )
    return [section for section in shown if section.rows]


def _is_ours(contender: str) -> bool:
    return contender.startswith(_OURS)


def _median_tokens_per_s(found: Sequence[Measurement]) -> float:
    return statistics.median(measurement.tokens_per_s for measurement in found)


def _speed_rows(comparison: Comparison, cases: Sequence[str]) -> list[tuple[str, ...]]:
    rows = []
    for contender, by_case in comparison.kept().items():
        cells = []
        for name in cases:
            found = by_case.get(name)
            if not found:
                cells.append("-")
                continue
            speed = _median_tokens_per_s(found)
            floor = found[0].floor_tokens_per_s(comparison.machine(found[0].dtype))
            cells.append(f"{speed:,.1f} ({speed / floor:.0%})")
        rows.append((contender, *cells))
    return rows


def _spread_rows(comparison: Comparison, cases: Sequence[str]) -> list[tuple[str, ...]]:
    rows = []
    for contender, by_case in comparison.kept().items():
        speeds = [[measurement.tokens_per_s for measurement in by_case.get(name, ())] for name in cases]
        rows.append((contender, *(f"{min(found):,.1f} to {max(found):,.1f}" if found else "-" for found in speeds)))
    return rows


def _ratios(comparison: Comparison, ours: str, peer: str, cases: Sequence[str]) -> tuple[str, ...]:
    """Of what was measured in the same rounds only: pieces are made at different times."""
    both = [piece for piece in comparison.pieces if {ours, peer} <= piece.engines.keys()]
    kept = Comparison(both).kept()
    cells = []
    for name in cases:
        found = [kept.get(contender, {}).get(name) for contender in (ours, peer)]
        our, their = [_median_tokens_per_s(each) if each else None for each in found]
        cells.append(f"{our / their:.2f}" if our and their else "-")
    return (peer, *cells)


_RUN_HEADER: Final = (
    "engine", "version", "asked to compute in", "K and V in", "tcmalloc", "packed weights in huge pages", "start, s",
    "kept", "discarded", "others at most",
)  # fmt: skip


def _runs(comparison: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for contender in comparison.kept():
        found = [m for m in comparison.measurements if m.contender == contender]
        kept = [m for m in found if m.is_kept]
        said = [piece.engines[contender] for piece in comparison.pieces if contender in piece.engines]
        rows.append(
            (
                contender, str(said[-1].get("version", "this commit")), found[-1].dtype, said[-1]["kv"],
                "yes" if said[-1]["has_tcmalloc"] else "no", percent(said[-1].get("in_huge_pages")),
                f"{min(one['start_s'] for one in said):.1f}", str(len(kept)), str(len(found) - len(kept)),
                f"{max(m.others_share for m in kept):.1%}",
            )
        )  # fmt: skip
    return rows
