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
from report import Section

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
    machine: Machine
    engines: Mapping[str, Any]  # by contender: version, settings and start_s, as its driver said
    not_measured: Mapping[str, str]  # contender or engine -> why
    measurements: Sequence[Measurement]


@dataclass(frozen=True)
class Comparison:
    """All pieces are of one shape and one machine."""

    pieces: Sequence[Piece]

    @property
    def machine(self) -> Machine:
        """The best that any piece saw: a floor is what the machine can do."""
        machines = [piece.machine for piece in self.pieces]
        return Machine(max(m.read_bytes_per_s for m in machines), max(m.flop_per_s for m in machines))

    def title(self) -> str:
        last, machine = self.pieces[-1], self.machine
        origin = last.origin
        return (
            f"{last.shape} (random weights), {last.num_threads} threads on {origin.num_cores} x {origin.cpu}, "
            f"commit {origin.git_commit}, {origin.date}; the machine reads {machine.read_bytes_per_s / 1e9:.1f} GB/s "
            f"and multiplies {machine.flop_per_s / 1e12:.2f} TFLOP/s in bfloat16"
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
    speeds = {
        contender: {name: _median_tokens_per_s(found) for name, found in by_case.items()}
        for contender, by_case in kept.items()
    }
    shown = [Section(("tokens/s (share of the floor)", *cases), _speed_rows(comparison, cases))]
    for ours in filter(_is_ours, speeds):
        header = (f"{ours}, times as fast as", *cases)
        shown.append(Section(header, [_ratios(ours, peer, speeds, cases) for peer in speeds if peer != ours]))
    shown.append(Section(("engine", "version", "start, s", "kept", "discarded", "others at most"), _runs(comparison)))
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
            cells.append(f"{speed:,.1f} ({speed / found[0].floor_tokens_per_s(comparison.machine):.0%})")
        rows.append((contender, *cells))
    return rows


def _ratios(ours: str, peer: str, speeds: Mapping[str, Mapping[str, float]], cases: Sequence[str]) -> tuple[str, ...]:
    both = [(speeds[ours].get(name), speeds[peer].get(name)) for name in cases]
    return (peer, *(f"{our / their:.2f}" if our and their else "-" for our, their in both))


def _runs(comparison: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for contender in comparison.kept():
        found = [m for m in comparison.measurements if m.contender == contender]
        kept = [m for m in found if m.is_kept]
        said = [piece.engines[contender] for piece in comparison.pieces if contender in piece.engines]
        rows.append(
            (
                contender, str(said[-1].get("version", "this commit")), f"{min(one['start_s'] for one in said):.1f}",
                str(len(kept)), str(len(found) - len(kept)), f"{max(m.others_share for m in kept):.1%}",
            )
        )  # fmt: skip
    return rows
