"""What a run of ``speculation.py`` leaves: its figures, piece by piece, and the tables made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from interference import mark
from provenance import Provenance
from report import Section
from speculation_figures import Figure, Ratio

from eagleray.core.errors import ConfigError

ADAPTIVE: Final = ", adaptive"
IDLE: Final = ", never guessing"
NO_DRAFT: Final = "no draft"
# What two pieces of one table may differ in: which rows they add, and where they are written.
_OWN_OPTIONS: Final = {"random", "trees", "only", "batches", "quick", "json", "add", "markdown"}


@dataclass(frozen=True)
class Piece:
    """One run of the command."""

    origin: Provenance
    options: Mapping[str, str]
    figures: Sequence[Figure]


@dataclass(frozen=True)
class SpeculationReport:
    """All pieces are of one machine, one commit and the same options but for those that choose rows."""

    pieces: Sequence[Piece]

    @property
    def figures(self) -> list[Figure]:
        """Of what was measured more than once, the last."""
        figures = {(figure.contender, figure.batch): figure for piece in self.pieces for figure in piece.figures}
        return list(figures.values())

    def title(self) -> str:
        origin, options = self.pieces[-1].origin, self.pieces[-1].options
        named = [options["model"], f"threads {options['threads']}", f"{options['depth']} tokens ahead"]
        named.append(f"answers of {options['max_tokens']}, rounds before that are not timed {options['untimed']}")
        if int(options.get("turn_steps", 0)):
            named.append(f"turns of {options['turn_steps']} steps")
        if int(options.get("engines", 1)) > 1:
            named.append(f"{options['engines']} sets of engines")
        if float(options["temperature"]):
            named.append(f"temperature {options['temperature']}")
        if options["verification"] != "target_token":
            named.append(f"verification by {options['verification']}")
        return (
            f"{', '.join(named)}, {origin.num_cores} x {origin.cpu}, commit {origin.git_commit}, {origin.date}, "
            f"prompts of {options['prompts']}"
        )

    def require_same(self, piece: Piece, file: Path) -> None:
        """Raises ``ConfigError`` when ``piece`` has no place in these tables."""
        for other in self.pieces:
            ours, theirs = _circumstances(piece), _circumstances(other)
            if differing := [name for name in ours if ours[name] != theirs.get(name)]:
                name = differing[0]
                way_out = f"its {name} is {theirs.get(name)}, now it is {ours[name]}; write to another file"
                raise ConfigError("--add", str(file), way_out)


def _circumstances(piece: Piece) -> dict[str, str]:
    origin = piece.origin
    shared = {name: value for name, value in piece.options.items() if name not in _OWN_OPTIONS}
    return {"commit": origin.git_commit, "processor": f"{origin.num_cores} x {origin.cpu}", **shared}


def read_report(file: Path) -> SpeculationReport:
    """Raises ``ConfigError`` for a file that is none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=SpeculationReport)
    except msgspec.DecodeError as error:
        raise ConfigError("--add", str(file), f"is no report of this program ({error}); write to another") from None


def write_report(file: Path, report: SpeculationReport) -> None:
    file.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def sections(figures: Sequence[Figure]) -> list[Section]:
    """Methods that always guess with what bounds them, then controllers, then drafts that are kept for nothing."""
    always = [figure for figure in figures if not figure.contender.endswith((ADAPTIVE, IDLE))]
    adaptive = [figure for figure in figures if figure.contender.endswith(ADAPTIVE)]
    idle = [figure for figure in figures if figure.contender.endswith(IDLE)]
    speeds = ("batch", "tokens per step", "by position", "tokens/s", "none", "speed-up (95 %)", "rounds", "others")
    bounds = (
        "bound", "with it", "t_decode, ms", "t_verify, ms", "t_draft, ms", "outside, ms", "none's, ms", "prefill"
    )  # fmt: skip
    differing = "differing answers"
    found = [
        Section(
            ("always guessing", *speeds, *bounds, differing),
            [(*_speed_cells(figure), *_bound_cells(figure), _count(figure.num_differing_answers)) for figure in always],
        ),
        Section(
            ("controller", *speeds, differing),
            [(*_speed_cells(figure), _count(figure.num_differing_answers)) for figure in adaptive],
        ),
        Section(("kept, never guessing", *speeds), [_speed_cells(figure) for figure in idle]),
    ]
    return [section for section in found if section.rows]


def _count(count: int | None) -> str:
    return "-" if count is None else str(count)


def _speed_cells(figure: Figure) -> tuple[str, ...]:
    return (
        figure.contender.removesuffix(ADAPTIVE).removesuffix(IDLE),
        str(figure.batch),
        f"{figure.tokens_per_step:.2f}",
        " ".join(f"{rate:.0%}" for rate in figure.rate_per_position) or "-",
        f"{figure.tokens_per_s:,.0f}",
        f"{figure.plain_tokens_per_s:,.0f}",
        _interval(figure.speed_up),
        f"{len(figure.counted_pairs)} of {len(figure.pairs)}",
        f"{figure.others_share:.1%}{mark(figure.others_share)}",
    )


def _bound_cells(figure: Figure) -> tuple[str, ...]:
    times_s = (
        figure.decode_s, figure.verify_s, figure.draft_s_per_token, figure.outside_s, figure.plain_outside_s
    )  # fmt: skip
    return (
        *("-" if bound is None else f"{bound:.2f}" for bound in (figure.bound, figure.bound_with_outside)),
        *map(_milliseconds, times_s),
        f"{figure.prefill_share:.0%}",
    )


def _interval(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.mean:.2f}"
    return f"{ratio.mean:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
