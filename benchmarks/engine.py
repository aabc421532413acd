"""How fast one engine is, without any server: beside each figure what the machine allows, measured in the same run.

    python benchmarks/engine.py --model demo
    python benchmarks/engine.py --shape qwen3-0.6b --dtype bfloat16 --threads 2 --json result.json

``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from engine_runs import PROMPT_TOKENS, BenchmarkEngine, CallCounter, Decoding, KernelClock
from floors import WEIGHT_BYTES, Machine, bytes_per_weight, in_child, measure_machine, step_work
from interference import OtherProcesses
from provenance import Provenance, provenance
from random_checkpoint import SHAPES, checkpoint_folder
from report import Section, to_markdown, to_terminal
from rich.console import Console

from eagleray.core.config import Config, parse_config
from eagleray.core.errors import ConfigError
from eagleray.kernels.native.build import NativeUnavailable

_KV_MEMORY_BYTES: Final = 2**30
_COUNTED_STEPS: Final = 8
_SPLIT_STEPS: Final = 32


@dataclass(frozen=True)
class Figure:
    """A median over the repeats, and the least time that the machine allows."""

    name: str
    tokens_per_s: float
    floor_tokens_per_s: float
    repeats_tokens_per_s: Sequence[float]

    @property
    def share_of_floor(self) -> float:
        return self.tokens_per_s / self.floor_tokens_per_s


@dataclass(frozen=True)
class StepSplit:
    """Where the time of a decoding step goes. ``outside_s`` is what no kernel accounts for: Python, what torch does
    for sampling and for building tensors, and waiting."""

    batch: int
    step_s: float
    outside_s: float
    num_calls: float  # of Python and C functions, on all threads: the same in every run


@dataclass(frozen=True)
class ProfileRow:
    """What one operation takes of a prefill."""

    operation: str
    seconds: float
    flop_per_s: float  # 0: not counted


@dataclass(frozen=True)
class Run:
    """Everything about one run."""

    origin: Provenance
    model: str
    dtype: str
    options: dict[str, Any]
    machine: Machine
    others_share: float  # of the cores' time, used by other processes during the run
    figures: Sequence[Figure]
    splits: Sequence[StepSplit]
    profile: Sequence[ProfileRow]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}; make it first")
    try:
        run = measure(options)
    except ConfigError as error:
        print(f"engine: {error}", file=sys.stderr)
        return 2
    _show(run, options.markdown)
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(run))) + b"\n")
    return 0


def measure(options: argparse.Namespace) -> Run:
    """Raises ``ConfigError`` for what cannot be served."""
    config = _config(options)
    others = OtherProcesses()
    with CallCounter() as counter:  # before the engine: threads are followed from their start
        engine = BenchmarkEngine(config)
        calls = _count_calls(engine, counter, options.batches)
    machine = in_child(measure_machine, engine.dtype, options.threads)
    figures = _figures(engine, machine, options)
    engine.close()
    splits, profile = _profile(config, calls, options.prefill_tokens)
    return Run(
        origin=provenance(),
        model=options.shape or options.model,
        dtype=engine.dtype,
        options={name: str(value) for name, value in vars(options).items()},
        machine=machine,
        figures=figures,
        splits=splits,
        profile=profile,
        others_share=others.share(),
    )


def _config(options: argparse.Namespace) -> Config:
    path = str(in_child(checkpoint_folder, options.shape, options.cache)) if options.shape else options.model
    model = {"path": path, "dtype": options.dtype}
    if options.quantization != "none":
        model["quantization"] = options.quantization
    pool = {"num_threads": options.threads, "engine": {"kv_memory_bytes": _KV_MEMORY_BYTES}}
    return parse_config({"model": model, "prefill": {"replicas": 0}, "decode": pool})


def _count_calls(engine: BenchmarkEngine, counter: CallCounter, batches: Sequence[int]) -> dict[int, float]:
    """Calls per decoding step, by batch."""
    counts = {}
    for batch in batches:
        longer = _calls_of(engine, counter, batch, 2 * _COUNTED_STEPS)
        counts[batch] = (longer - _calls_of(engine, counter, batch, _COUNTED_STEPS)) / _COUNTED_STEPS
    return counts


def _calls_of(engine: BenchmarkEngine, counter: CallCounter, batch: int, num_steps: int) -> int:
    before = counter.num_calls
    engine.decode(batch, num_steps)
    return counter.num_calls - before


def _figures(engine: BenchmarkEngine, machine: Machine, options: argparse.Namespace) -> list[Figure]:
    """Repeats go round and round, so that a slow moment of the machine hits all figures alike."""
    prefill: list[float] = []
    decode: dict[int, list[float]] = {batch: [] for batch in options.batches}
    for _ in range(options.repeats):
        prefill.append(options.prefill_tokens / engine.prefill(options.prefill_tokens))
        for batch, rates in decode.items():
            rates.append(_tokens_per_s(engine.decode(batch, options.decode_tokens)))
    floor = _prefill_floor(engine, machine, options)
    figures = [Figure(f"prefill {options.prefill_tokens}", statistics.median(prefill), floor, prefill)]
    for batch, rates in decode.items():
        floor = _decode_floor(engine, machine, options, batch)
        figures.append(Figure(f"decode {batch}", statistics.median(rates), floor, rates))
    return figures


def _tokens_per_s(decoding: Decoding) -> float:
    return decoding.batch * len(decoding.step_s) / sum(decoding.step_s)


def _prefill_floor(engine: BenchmarkEngine, machine: Machine, options: argparse.Namespace) -> float:
    """Tokens per second, in the chunks that the engine makes."""
    weight = bytes_per_weight(engine.model_config, engine.dtype, options.quantization)
    total, chunk = options.prefill_tokens, engine.config.decode.engine.max_num_batched_tokens
    work = (
        step_work(engine.model_config, engine.dtype, weight, first, min(total, first + chunk), 1)
        for first in range(0, total, chunk)
    )
    return float(total / sum(map(machine.floor_s, work)))


def _decode_floor(engine: BenchmarkEngine, machine: Machine, options: argparse.Namespace, batch: int) -> float:
    """Tokens per second at the mean length."""
    weight = bytes_per_weight(engine.model_config, engine.dtype, options.quantization)
    position = PROMPT_TOKENS + options.decode_tokens // 2
    return batch / machine.floor_s(step_work(engine.model_config, engine.dtype, weight, position, position + 1, batch))


def _profile(config: Config, calls: dict[int, float], prefill_tokens: int) -> tuple[list[StepSplit], list[ProfileRow]]:
    """On an engine of its own, whose kernels are timed: that costs a little. None without native kernels."""
    clock = KernelClock()
    try:
        engine = BenchmarkEngine(config, clock)
    except NativeUnavailable:
        return [], []
    splits = []
    for batch, num_calls in calls.items():
        engine.decode(batch, 1)
        decoding = engine.decode(batch, _SPLIT_STEPS)
        step_s = statistics.fmean(decoding.step_s)
        splits.append(StepSplit(batch, step_s, step_s - decoding.kernel_s / len(decoding.step_s), num_calls))
    engine.prefill(prefill_tokens)
    clock.by_operation.clear()
    total_s = engine.prefill(prefill_tokens)
    engine.close()
    by_time = sorted(clock.by_operation.items(), key=lambda item: -item[1].seconds)
    profile = [ProfileRow(name, found.seconds, found.flop / found.seconds) for name, found in by_time]
    return splits, [*profile, ProfileRow("outside kernels", total_s - clock.total_s, 0.0)]


def _show(run: Run, as_markdown: bool) -> None:
    origin = run.origin
    title = (
        f"{run.model}, {run.dtype}, quantization {run.options['quantization']}, threads {run.options['threads']}, "
        f"{origin.num_cores} x {origin.cpu}, commit {origin.git_commit}, {origin.date}; read "
        f"{run.machine.read_bytes_per_s / 1e9:.1f} GB/s, multiplied {run.machine.flop_per_s / 1e12:.2f} TFLOP/s; "
        f"others used {run.others_share:.1%} of the cores"
    )
    shown = _sections(run)
    if as_markdown:
        print(f"{title}\n\n{to_markdown(shown)}")
    else:
        Console().print(title, to_terminal(shown), sep="\n", highlight=False, markup=False)


def _sections(run: Run) -> list[Section]:
    figures = [
        (
            figure.name,
            f"{figure.tokens_per_s:,.1f}",
            f"{figure.floor_tokens_per_s:,.0f}",
            f"{figure.share_of_floor:.1%}",
        )
        for figure in run.figures
    ]
    splits = [
        (
            str(split.batch), f"{split.step_s * 1e3:.2f}", f"{split.outside_s * 1e3:.2f}",
            f"{split.outside_s / split.step_s:.1%}", f"{split.num_calls:,.0f}",
        )
        for split in run.splits
    ]  # fmt: skip
    profile = [
        (
            row.operation, f"{row.seconds * 1e3:.1f}", f"{row.flop_per_s / 1e12:.2f}" if row.flop_per_s else "-",
        )
        for row in run.profile
    ]  # fmt: skip
    return [
        Section(("tokens per second", "measured", "floor", "share"), figures),
        Section(("decode, batch", "step, ms", "outside kernels, ms", "share", "calls"), splits),
        Section(("one prefill", "ms", "TFLOP/s"), profile),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="engine.py", description=__doc__.partition("\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", default="demo", help="folder of a checkpoint, or demo")
    add("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of a model")
    add("--cache", type=Path, default=Path(tempfile.gettempdir()) / "eagleray-benchmarks", help="where shapes are kept")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="to compute in")
    add("--quantization", choices=sorted(WEIGHT_BYTES), default="none", help="model.quantization")
    add("--threads", type=int, default=1, help="of the engine")
    add("--prefill-tokens", type=int, default=1024, help="of one prompt")
    add("--decode-tokens", type=int, default=128, help="of each request")
    add("--batches", type=int, nargs="+", default=(1, 8, 32), help="requests that decode together")
    add("--repeats", type=int, default=3, help="of every figure")
    add("--json", type=Path, help="write everything to this file")
    add("--markdown", action="store_true", help="print Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
