"""What guessing ahead brings, by method and batch size: tokens per step, speed against no guessing, and its bound.

    python benchmarks/speculation.py --json speculation.json --markdown > speculation.md
    python benchmarks/speculation.py --model MODEL --draft HEAD --prompts held_out.jsonl
    eagleray train-draft --model demo --method medusa --data prompts.jsonl --output HEADS
    python benchmarks/speculation.py --draft models/demo/draft HEADS --trees --random eagle draft_model

A long table can be measured in pieces: with ``--json FILE --add`` the rows that FILE holds are kept, and the tables are
of everything. ``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

from provenance import provenance
from report import to_markdown, to_terminal
from rich.console import Console
from speculation_figures import Figure, figure
from speculation_report import (
    ADAPTIVE,
    IDLE,
    NO_DRAFT,
    Piece,
    SpeculationReport,
    read_report,
    sections,
    write_report,
)
from speculation_runs import (
    NO_SPECULATION,
    Contender,
    Round,
    computing_on_one_core,
    in_short_turns,
    in_turns,
    read_prompts,
    turned,
)

from eagleray.core.config import DEMO_DRAFT_PATH, DEMO_MODEL, Config, SpeculationConfig, parse_config
from eagleray.core.errors import ConfigError
from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.draft_heads.read import read_draft
from eagleray.models.model_config import ModelConfig
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.models.registry import load_model_config

_PROMPTS: Final = Path(__file__).resolve().parent / "prompts" / "demo_held_out.jsonl"
_KV_MEMORY_BYTES: Final = 512 * 2**20
_RANDOM: Final = ("eagle", "eagle3", "medusa", "draft_model")
_RANDOM_NAME: Final = "random weights (cost only)"
_TREE: Final = {"tree_branching": 4, "tree_nodes": 15}
_TREE_NAME: Final = "tree of 15"  # of EAGLE-2's kind
_QUICK: Final = {"num_prompts": 4, "max_tokens": 32, "repeats": 2, "batches": (1, 4)}


def _named(option: object) -> str:
    """As results tell it: of a file its name, not where one machine keeps it."""
    if isinstance(option, list | tuple):
        return " ".join(map(_named, option))
    return option.name if isinstance(option, Path) else str(option)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(_QUICK)
    if options.turn_steps < 0:
        parser.error(
            f"--turn-steps {options.turn_steps}: take 0 for whole rounds, or so many steps as a turn shall have"
        )
    if options.engines < 1:
        parser.error(f"--engines {options.engines}: take 1 or more")
    if options.add and not options.json:
        parser.error("--add needs --json FILE, the report to add to")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}; make it first")
    if options.trees and options.verification == "rejection":
        print("speculation: --verification rejection is for chains, so trees are left out", file=sys.stderr)
        options.trees = False
    try:
        report = _measure_piece(options)
    except ConfigError as error:
        print(f"speculation: {error}", file=sys.stderr)
        return 2
    _show(report, options.markdown)
    return 0


def _measure_piece(options: argparse.Namespace) -> SpeculationReport:
    """Together with what there was before. The file is written whenever there is a new figure."""
    before = read_report(options.json) if options.add and options.json.exists() else SpeculationReport(())
    piece = Piece(provenance(), {name: _named(value) for name, value in vars(options).items()}, ())
    before.require_same(piece, options.json)
    for figures in measure(options):
        piece = replace(piece, figures=[*piece.figures, *figures])
        if options.json:
            write_report(options.json, SpeculationReport((*before.pieces, piece)))
    return SpeculationReport((*before.pieces, piece))


def measure(options: argparse.Namespace) -> Iterator[list[Figure]]:
    """Of one method and batch size after the other. Raises ``ConfigError`` for what cannot be served."""
    config = _config(options)
    prompts = read_prompts(options.prompts, config.model.folder)
    model = load_model_config(config.model.folder)
    with tempfile.TemporaryDirectory() as folder:
        for name, fields in methods_of(options, model, Path(folder)).items():
            yield from _compare(name, fields, config, prompts, options)


def _compare(
    name: str, fields: Mapping[str, Any], config: Config, prompts: Sequence[Sequence[int]], options: argparse.Namespace
) -> Iterator[list[Figure]]:
    """One method, always guessing (unless that is left out) and under its controller, in turns with no guessing. If
    asked for, its draft as well which never guesses: no controller can better that where guessing does not pay. And a
    second engine without one."""
    always = [] if options.controller_only else [options.depth]  # the others' depth is not one
    taken: dict[int, list[list[Round]]] = {batch: [] for batch in options.batches}
    for engines in range(options.engines):
        with contextlib.ExitStack() as closing:
            asked = list(_contenders(name, fields, options))
            built = {}
            for place in turned(range(len(asked)), engines):  # each set begins with another
                each, draft, how = asked[place]
                contender = Contender(each, config, draft, options.temperature, **how)
                built[place] = closing.enter_context(contextlib.closing(contender))
                contender.answer(prompts[:1], batch=1, max_tokens=2)  # its threads begin
            contenders = [built[place] for place in range(len(asked))]
            if options.threads == 1:
                closing.enter_context(computing_on_one_core())
            for batch in options.batches:
                rounds = _take_turns(contenders, prompts, batch, options)
                taken[batch] += [[replace(each, engines=engines) for each in turn] for turn in rounds]
                if engines == options.engines - 1:
                    plain_rounds, *guessing_rounds = zip(*taken[batch], strict=True)
                    depths = [*always, *[None] * (len(guessing_rounds) - len(always))]
                    yield [
                        figure(plain_rounds, each, depth) for each, depth in zip(guessing_rounds, depths, strict=True)
                    ]


def _contenders(
    name: str, fields: Mapping[str, Any], options: argparse.Namespace
) -> Iterator[tuple[str, SpeculationConfig | None, dict[str, bool]]]:
    """Arguments of each, the one that does not guess first."""
    yield NO_SPECULATION, None, {}
    for adaptive in [True] if options.controller_only else [False, True]:
        yield f"{name}{ADAPTIVE if adaptive else ''}", SpeculationConfig(**dict(fields, adaptive=adaptive)), {}
    if options.idle:
        yield f"{NO_DRAFT}, beside {name}{IDLE}", None, {}
        yield f"{name}{IDLE}", SpeculationConfig(**fields), {"never_guesses": True}


def _take_turns(
    contenders: Sequence[Contender], prompts: Sequence[Sequence[int]], batch: int, options: argparse.Namespace
) -> list[list[Round]]:
    # Enough for some time with the whole batch: where answers run out, fewer and fewer decode together.
    num_prompts = max(options.num_prompts, options.waves * batch)
    asked = list(islice(cycle(prompts), num_prompts))
    turns = (asked, batch, options.max_tokens, options.repeats, options.untimed)
    if options.turn_steps:
        return in_short_turns(contenders, *turns, options.turn_steps)
    return in_turns(contenders, *turns)


def methods_of(options: argparse.Namespace, target: ModelConfig, folder: Path) -> dict[str, dict[str, Any]]:
    """Fields of ``SpeculationConfig`` by name: what needs no checkpoint, then every draft that there is."""
    early = {"method": "early_exit", "early_exit_layers": options.early_exit_layers or _few_layers(target)}
    methods: dict[str, dict[str, Any]] = {"ngram": {"method": "ngram"}, "early exit": early}
    drafts = list(options.draft)
    if not drafts and options.model == DEMO_MODEL and DEMO_DRAFT_PATH.is_dir():
        drafts.append(DEMO_DRAFT_PATH)
    for draft in drafts:
        method = read_draft(draft, target).method
        methods[f"{method} {draft.name}"] = {"method": method, "model": str(draft)}
    for method in options.random or ([] if drafts else ["eagle3"]):
        _save_random_draft(method, options.model, target, folder / method)
        methods[f"{method}, {_RANDOM_NAME}"] = {"method": method, "model": str(folder / method)}
    if options.only:
        methods = {name: fields for name, fields in methods.items() if fields["method"] in options.only}
    if options.trees:
        methods |= {
            f"{name}, {_TREE_NAME}": fields | _TREE for name, fields in methods.items() if fields["method"] != "ngram"
        }
    of_all = {"num_speculative_tokens": options.depth, "verification": options.verification}
    return {name: fields | of_all for name, fields in methods.items()}


def _save_random_draft(method: str, model: str, target: ModelConfig, folder: Path) -> None:
    """It tells what guessing costs where nothing comes true."""
    if method != "draft_model":
        save_random_draft(folder, method, target, seed=0)  # type: ignore[arg-type]
        return
    folder.mkdir()
    config = json.loads((parse_config({"model": {"path": model}}).model.folder / "config.json").read_text("utf-8"))
    save_random_checkpoint(folder, config | {"num_hidden_layers": _few_layers(target)}, seed=0)


def _few_layers(target: ModelConfig) -> int:
    """Of a network that guesses."""
    return max(1, target.num_layers // 4)


def _config(options: argparse.Namespace) -> Config:
    engine = {
        "kv_memory_bytes": _KV_MEMORY_BYTES,
        "enable_prefix_caching": False,
        "max_num_seqs": max(options.batches),
    }
    model = {"path": options.model, "dtype": options.dtype}
    pool = {"num_threads": options.threads, "engine": engine}
    return parse_config({"model": model, "prefill": {"replicas": 0}, "decode": pool})


def _show(report: SpeculationReport, as_markdown: bool) -> None:
    shown = sections(report.figures)
    if as_markdown:
        print(f"{report.title()}\n\n{to_markdown(shown)}")
    else:
        Console().print(report.title(), to_terminal(shown), sep="\n", highlight=False, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="speculation.py", description=__doc__.partition("\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", default=DEMO_MODEL, help="folder of a checkpoint, or demo")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="to compute in")
    add("--draft", type=Path, nargs="*", default=(), help="folders of drafts; none: the packaged one, or a random one")
    add("--random", nargs="*", choices=_RANDOM, default=(), help="methods to measure with random weights as well")
    add("--trees", action="store_true", help="measure what does not look up text with trees as well")
    add("--only", nargs="*", default=(), help="methods to measure; none: all that there are")
    add("--prompts", type=Path, default=_PROMPTS, help="JSONL with messages or prompt in each line")
    add("--num-prompts", type=int, default=16, help="answered in each round, or more for large batches")
    add("--waves", type=int, default=6, help="prompts for each place of a batch in a round, at least")
    add("--max-tokens", type=int, default=128, help="of each answer")
    add("--depth", type=int, default=3, help="tokens ahead to guess")
    add("--temperature", type=float, default=0.0, help="of every request; above 0 each has a seed")
    add("--verification", choices=("target_token", "rejection"), default="target_token", help="rule; see operations.md")
    add("--early-exit-layers", type=int, help="layers that guess; default: a quarter of the model's")
    add("--batches", type=int, nargs="+", default=(1, 4, 16), help="requests that decode together")
    add("--threads", type=int, default=1, help="of each engine")
    add("--repeats", type=int, default=5, help="rounds of each contender, taken in turns")
    add("--controller-only", action="store_true", help="leave out what always guesses: many short rounds take less")
    add("--idle", action="store_true", help="measure also drafts that never guess, and a second engine without one")
    add("--untimed", type=int, default=1, help="rounds before them, in which controllers learn and steps are recorded")
    add("--turn-steps", type=int, default=0,
        help="instead of rounds take turns of so many steps (10), in which an answer follows another; --repeats counts "
        "them: small differences show sooner, and answers are not compared")  # fmt: skip
    add("--engines", type=int, default=1,
        help="build all engines so many times, one after the other: two of equal work differ by some per cent as long "
        "as they live, and the interval is of such pairs then")  # fmt: skip
    add("--quick", action="store_true", help="few prompts, short answers, two rounds: to see that it works")
    add("--json", type=Path, help="write everything to this file, after every row")
    add("--add", action="store_true", help="keep the rows that the file has already")
    add("--markdown", action="store_true", help="print Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
