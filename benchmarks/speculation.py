"""What guessing ahead brings, by method and batch size: tokens per step, speed against no guessing, and its bound.

    python benchmarks/speculation.py --json speculation.json --markdown > speculation.md
    python benchmarks/speculation.py --model MODEL --draft HEAD --prompts held_out.jsonl
    eagleray train-draft --model demo --method medusa --data prompts.jsonl --output HEADS
    python benchmarks/speculation.py --draft models/demo/draft HEADS --trees --random eagle draft_model

``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

import msgspec
from interference import OtherProcesses
from provenance import Provenance, provenance
from report import Section, to_markdown, to_terminal
from rich.console import Console
from speculation_figures import Figure, Ratio, figure
from speculation_runs import NO_SPECULATION, Contender, in_turns, read_prompts

from eagleray.core.config import DEMO_DRAFT_PATH, DEMO_MODEL, Config, SpeculationConfig, parse_config
from eagleray.core.errors import ConfigError
from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.draft_heads.read import read_draft
from eagleray.models.model_config import ModelConfig
from eagleray.models.random_weights import save_random_checkpoint

_PROMPTS: Final = Path(__file__).resolve().parent / "prompts" / "demo.jsonl"
_KV_MEMORY_BYTES: Final = 512 * 2**20
_BATCHES_OF_PROMPTS: Final = 6  # at least, in a round
_ADAPTIVE: Final = ", adaptive"
_RANDOM: Final = ("eagle", "eagle3", "medusa", "draft_model")
_TREE: Final = {"tree_branching": 4, "tree_nodes": 15}
_TREE_NAME: Final = "tree of 15"  # of EAGLE-2's kind
_QUICK: Final = {"num_prompts": 4, "max_tokens": 32, "repeats": 2, "batches": (1, 4)}


@dataclass(frozen=True)
class Run:
    """Everything about one run."""

    origin: Provenance
    model: str
    options: dict[str, Any]
    others_share: float  # of the cores' time, used by other processes during the run
    figures: Sequence[Figure]
    bounds: Sequence[float | None]  # of the figures


def _named(option: object) -> str:
    """As results tell it: of a file its name, not where one machine keeps it."""
    return option.name if isinstance(option, Path) else str(option)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(_QUICK)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}; make it first")
    try:
        run = measure(options)
    except ConfigError as error:
        print(f"speculation: {error}", file=sys.stderr)
        return 2
    _show(run, options.markdown)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(run))) + b"\n")
    return 0


def measure(options: argparse.Namespace) -> Run:
    """Raises ``ConfigError`` for what cannot be served."""
    config = _config(options)
    prompts = read_prompts(options.prompts, config.model.folder)
    others = OtherProcesses()
    figures: list[Figure] = []
    plain = Contender(NO_SPECULATION, config, None)
    with tempfile.TemporaryDirectory() as folder:
        for name, fields in methods_of(options, plain.model_config, Path(folder)).items():
            figures += _compare(name, fields, plain, config, prompts, options)
    plain.close()
    return Run(
        origin=provenance(),
        model=options.model,
        options={name: _named(value) for name, value in vars(options).items()},
        others_share=others.share(),
        figures=figures,
        bounds=[figure.bound for figure in figures],
    )


def _compare(
    name: str,
    fields: Mapping[str, Any],
    plain: Contender,
    config: Config,
    prompts: Sequence[Sequence[int]],
    options: argparse.Namespace,
) -> list[Figure]:
    """One method, always guessing and under its controller, in turns with no guessing."""
    guessing = [
        Contender(
            f"{name}{_ADAPTIVE if adaptive else ''}", config, SpeculationConfig(**dict(fields, adaptive=adaptive))
        )
        for adaptive in (False, True)
    ]
    figures = []
    for batch in options.batches:
        # Enough for some time with the whole batch: where answers run out, fewer and fewer decode together.
        num_prompts = max(options.num_prompts, _BATCHES_OF_PROMPTS * batch)
        asked = list(islice(cycle(prompts), num_prompts))
        rounds = in_turns([plain, *guessing], asked, batch, options.max_tokens, options.repeats)
        plain_rounds, *guessing_rounds = zip(*rounds, strict=True)
        always_rounds, adaptive_rounds = guessing_rounds
        figures += [figure(plain_rounds, always_rounds, options.depth), figure(plain_rounds, adaptive_rounds, None)]
    for contender in guessing:
        contender.close()
    return figures


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
        methods[f"{method}, random weights"] = {"method": method, "model": str(folder / method)}
    if options.only:
        methods = {name: fields for name, fields in methods.items() if fields["method"] in options.only}
    if options.trees:
        methods |= {
            f"{name}, {_TREE_NAME}": fields | _TREE for name, fields in methods.items() if fields["method"] != "ngram"
        }
    return {name: fields | {"num_speculative_tokens": options.depth} for name, fields in methods.items()}


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


def _show(run: Run, as_markdown: bool) -> None:
    origin = run.origin
    title = (
        f"{run.model}, threads {run.options['threads']}, {run.options['depth']} tokens ahead, "
        f"{origin.num_cores} x {origin.cpu}, commit {origin.git_commit}, {origin.date}; "
        f"others used {run.others_share:.1%} of the cores"
    )
    shown = sections(run.figures)
    if as_markdown:
        print(f"{title}\n\n{to_markdown(shown)}")
    else:
        Console().print(title, to_terminal(shown), sep="\n", highlight=False, markup=False)


def sections(figures: Sequence[Figure]) -> list[Section]:
    """Methods that always guess with what bounds them, then controllers."""
    always = [figure for figure in figures if not figure.contender.endswith(_ADAPTIVE)]
    adaptive = [figure for figure in figures if figure.contender.endswith(_ADAPTIVE)]
    header = (
        "always guessing", "batch", "tokens per step", "by position", "tokens/s", "none", "speed-up (95 %)", "bound",
        "t_decode, ms", "t_verify, ms", "t_draft, ms", "differing answers",
    )  # fmt: skip
    rows = [
        (
            *_speed_cells(figure),
            "-" if figure.bound is None else f"{figure.bound:.2f}",
            *(_milliseconds(seconds) for seconds in (figure.decode_s, figure.verify_s, figure.draft_s_per_token)),
            str(figure.num_differing_answers),
        )
        for figure in always
    ]
    return [
        Section(header, rows),
        Section(("controller", *header[1:7]), [_speed_cells(figure) for figure in adaptive]),
    ]


def _speed_cells(figure: Figure) -> tuple[str, ...]:
    return (
        figure.contender.removesuffix(_ADAPTIVE),
        str(figure.batch),
        f"{figure.tokens_per_step:.2f}",
        " ".join(f"{rate:.0%}" for rate in figure.rate_per_position) or "-",
        f"{figure.tokens_per_s:,.0f}",
        f"{figure.plain_tokens_per_s:,.0f}",
        _interval(figure.speed_up),
    )


def _interval(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.mean:.2f}"
    return f"{ratio.mean:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


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
    add("--num-prompts", type=int, default=16, help="answered in each round, at least 6 for each place of a batch")
    add("--max-tokens", type=int, default=128, help="of each answer")
    add("--depth", type=int, default=3, help="tokens ahead to guess")
    add("--early-exit-layers", type=int, help="layers that guess; default: a quarter of the model's")
    add("--batches", type=int, nargs="+", default=(1, 4, 16), help="requests that decode together")
    add("--threads", type=int, default=1, help="of each engine")
    add("--repeats", type=int, default=5, help="rounds of each contender, taken in turns")
    add("--quick", action="store_true", help="few prompts, short answers, two rounds: to see that it works")
    add("--json", type=Path, help="write everything to this file")
    add("--markdown", action="store_true", help="print Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
