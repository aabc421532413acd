"""How fast one engine is, without any server: beside each figure what the machine allows, measured in the same run.

    python benchmarks/engine.py --model demo
    python benchmarks/engine.py --shape qwen3-0.6b --dtype bfloat16 --threads 2 --json result.json

``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import msgspec
from engine_report import Figure, Profile, Run, StepSplit, Timing, figure_of, sections
from engine_runs import PROMPT_TOKENS, BenchmarkEngine, CallCounter, Decoding, KernelClock, Operation
from floors import WEIGHT_BYTES, Machine, bytes_per_weight, in_child, measure_machine, step_work
from interference import undisturbed
from process_cpu import share_in_huge_pages
from provenance import provenance
from random_checkpoint import SHAPES, checkpoint_folder
from report import to_markdown, to_terminal
from rich.console import Console

from eagleray.core.config import Config, parse_config
from eagleray.core.errors import ConfigError
from eagleray.kernels.native.build import NativeUnavailable

_KV_MEMORY_BYTES: Final = 2**30
_COUNTED_STEPS: Final = 16  # in as many every request begins one KV block
_SPLIT_STEPS: Final = 32


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
    with CallCounter() as counter:  # before the engine: threads are followed from their start
        engine = BenchmarkEngine(config, counter=counter)
        in_huge_pages = share_in_huge_pages(os.getpid(), ".packed")
        calls = {batch: _count_calls(engine, batch) for batch in options.batches}
    figures, machines = _figures(engine, options)
    engine.close()
    return Run(
        origin=provenance(),
        model=options.shape or options.model,
        dtype=engine.dtype,
        options={name: str(value) for name, value in vars(options).items()},
        machines=machines,
        figures=figures,
        splits=_splits(config, calls),
        profiles=_profiles(config, options),
        computes_with=engine.computes_with,
        weights_in_huge_pages=in_huge_pages,
    )


def _config(options: argparse.Namespace) -> Config:
    path = str(in_child(checkpoint_folder, options.shape, options.cache)) if options.shape else options.model
    model = {"path": path, "dtype": options.dtype}
    if options.quantization != "none":
        model["quantization"] = options.quantization
    pool = {
        "num_threads": options.threads,
        "engine": {
            "kv_memory_bytes": _KV_MEMORY_BYTES,
            "enable_prefix_caching": False,
        },  # blocks are used again at once
    }
    return parse_config({"model": model, "prefill": {"replicas": 0}, "decode": pool})


def _count_calls(engine: BenchmarkEngine, batch: int) -> float:
    """Calls per decoding step, of steps that have been recorded: the first ones of their shapes are made otherwise."""
    engine.decode(batch, _COUNTED_STEPS)
    return engine.decode(batch, _COUNTED_STEPS).num_calls / _COUNTED_STEPS


def _figures(engine: BenchmarkEngine, options: argparse.Namespace) -> tuple[list[Figure], list[Machine]]:
    """Repeats go round and round, so that a slow moment of the machine hits all figures alike; before each round the
    machine itself is measured."""
    prefill: list[Timing] = []
    decode: dict[int, list[Timing]] = {batch: [] for batch in options.batches}
    machines: list[Machine] = []
    for _ in range(options.repeats):
        machines.append(machine := in_child(measure_machine, engine.dtype, options.threads))
        duration_s, others_share = undisturbed(lambda: engine.prefill(options.prefill_tokens))
        floor = _prefill_floor(engine, machine, options)
        prefill.append(Timing(options.prefill_tokens / duration_s, others_share, floor))
        for batch, timings in decode.items():
            decoding, others_share = undisturbed(lambda batch=batch: engine.decode(batch, options.decode_tokens))
            floor = _decode_floor(engine, machine, options, batch)
            timings.append(Timing(_tokens_per_s(decoding), others_share, floor))
    figures = [figure_of(f"prefill {options.prefill_tokens}", prefill)]
    figures += [figure_of(f"decode {batch}", timings) for batch, timings in decode.items()]
    return figures, machines


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


def _splits(config: Config, calls: Mapping[int, float]) -> list[StepSplit]:
    """On an engine of its own, whose kernels are timed: that costs a little. None without native kernels."""
    try:
        engine = BenchmarkEngine(config, KernelClock())
    except NativeUnavailable:
        return []
    splits = []
    for batch, num_calls in calls.items():
        engine.decode(batch, _SPLIT_STEPS)  # or memory that was never touched would be provided within the steps
        decoding, others_share = undisturbed(lambda batch=batch: engine.decode(batch, _SPLIT_STEPS))
        num_steps, parts = len(decoding.step_s), decoding.parts
        step_s = statistics.fmean(decoding.step_s)
        outside_s = step_s - decoding.kernel_s / num_steps
        between_s = (parts.loop_s / num_steps, parts.hand_over_s / num_steps)
        splits.append(StepSplit(batch, step_s, outside_s, num_calls, others_share, *between_s))
    engine.close()
    return splits


def _profiles(config: Config, options: argparse.Namespace) -> list[Profile]:
    """By operation, which a replayed step does not tell apart: on an engine that replays none. None without native
    kernels."""
    clock = KernelClock()
    try:
        engine = BenchmarkEngine(config, clock, has_replay=False)
    except NativeUnavailable:
        return []
    profiles = [_prefill_profile(engine, clock, options.prefill_tokens)]
    for batch in options.batches:
        engine.decode(batch, _SPLIT_STEPS)  # or memory that was never touched would be provided within the steps
        decoding, others_share = undisturbed(lambda batch=batch: engine.decode(batch, _SPLIT_STEPS))
        name, total_s = f"a step of decode {batch}, not replayed", sum(decoding.step_s)
        profiles.append(Profile(name, total_s, len(decoding.step_s), decoding.by_operation, others_share))
    engine.close()
    return profiles


def _prefill_profile(engine: BenchmarkEngine, clock: KernelClock, num_tokens: int) -> Profile:
    def timed() -> tuple[float, Mapping[str, Operation]]:
        clock.taken()
        return engine.prefill(num_tokens), clock.taken()

    timed()
    (total_s, by_operation), others_share = undisturbed(timed)
    return Profile(f"one prefill of {num_tokens}", total_s, 1, by_operation, others_share)


def _show(run: Run, as_markdown: bool) -> None:
    if as_markdown:
        print(f"{run.title()}\n\n{to_markdown(sections(run))}")
    else:
        Console().print(run.title(), to_terminal(sections(run)), sep="\n", highlight=False, markup=False)


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
