"""Engines beside each other on one machine, in turn: each in its own process and its own Python, on the same weights.

    python benchmarks/compare.py --folder models --vllm-python vllm/bin/python --openvino-python openvino/bin/python \
        --transformers-python transformers/bin/python --json result.json

Without ``--engines``: all that have a Python. A long comparison can be made in pieces: with ``--json FILE --add`` what
FILE holds is kept, and the tables are of everything. ``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from comparison import Case, Comparison, Measurement, Piece, read_comparison, sections, write_comparison
from contenders import CONTENDERS, Contender, Pythons, default_pythons, environment, model_folder
from driver import Driver, DriverError, start_driver
from floors import Work, measure_machine, step_work
from interference import OtherProcesses
from provenance import provenance
from random_checkpoint import FIRST_TEXT_TOKEN_ID, SHAPES, checkpoint_folder
from report import to_markdown, to_terminal
from rich.console import Console

from eagleray.models.model_config import ModelConfig
from eagleray.models.registry import load_model_config

DECODE_PROMPT_TOKENS: Final = 32
_START_TIMEOUT_S: Final = 400.0
_GENERATE_TIMEOUT_S: Final = 200.0
_WARM_UP_TOKENS: Final = 4
_PROMPT_TOKEN_IDS: Final = range(FIRST_TEXT_TOKEN_ID, 1024)  # every shape has these
_ATTEMPTS: Final = 3  # at a measurement that other processes disturb
_KV_MEMORY_BYTES: Final = 2 * 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every engine was measured."""
    options = _parser().parse_args(arguments)
    before = read_comparison(options.json) if options.add and options.json.exists() else Comparison(())
    piece = asyncio.run(measure(options))
    comparison = Comparison((*before.pieces, piece))
    if options.json:
        write_comparison(options.json, comparison)
    _show(comparison, options.markdown)
    return 1 if piece.not_measured else 0


async def measure(options: argparse.Namespace) -> Piece:
    """Start all engines, then go round and round: A B C A B C."""
    pythons = default_pythons(
        vllm=options.vllm_python, openvino=options.openvino_python, transformers=options.transformers_python
    )
    checkpoint = checkpoint_folder(options.shape, options.folder)
    config, machine = load_model_config(checkpoint), measure_machine("bfloat16", options.threads)
    measurements: list[Measurement] = []
    async with AsyncExitStack() as stack:
        started = _Started(options, pythons, checkpoint, stack)
        for contender in pythons.chosen(options.engines):
            await started.start(contender)
        for round_number in range(1, options.repeats + 1):
            for contender, driver in started.drivers.items():
                for case in _cases(options):
                    work = _work(config, contender, case)
                    measurements += await _measure(contender.name, driver, case, work, options.max_others)
                    _say(f"round {round_number}, {contender.name}, {case.name}: {_spoken(measurements[-1])}")
    return Piece(
        origin=provenance(),
        shape=options.shape,
        num_threads=options.threads,
        machine=machine,
        engines=started.descriptions,
        not_measured=started.failures | dict.fromkeys(pythons.missing(), "no Python was given for it"),
        measurements=measurements,
    )


def _spoken(measurement: Measurement) -> str:
    state = "" if measurement.is_kept else ", discarded"
    return f"{measurement.tokens_per_s:,.1f} tokens/s, others {measurement.others_share:.1%}{state}"


def _work(config: ModelConfig, contender: Contender, case: Case) -> Work:
    """One yardstick for all that have the same weights: products and K and V in bfloat16."""
    first, last = 0, case.prompt_tokens
    if case.kind == "decode":
        first = case.prompt_tokens + case.output_tokens // 2
        last = first + 1
    return step_work(config, "bfloat16", contender.bytes_per_weight, first, last, case.batch)


def _cases(options: argparse.Namespace) -> list[Case]:
    prefill = Case("prefill", 1, options.prefill_tokens, 1)
    return [prefill, *(Case("decode", n, DECODE_PROMPT_TOKENS, options.decode_tokens) for n in options.batches)]


class _Started:
    """The engines that could be started, and why the others could not."""

    def __init__(self, options: argparse.Namespace, pythons: Pythons, checkpoint: Path, stack: AsyncExitStack) -> None:
        self._options, self._pythons, self._checkpoint, self._stack = options, pythons, checkpoint, stack
        self._logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.drivers: dict[Contender, Driver] = {}
        self.descriptions: dict[str, Mapping[str, object]] = {}
        self.failures: dict[str, str] = {}

    async def start(self, contender: Contender) -> None:
        """Until it has answered one request of every kind: what is compiled or allocated at first use is there."""
        _say(f"starting {contender.name}")
        python = self._pythons.by_engine[contender.engine]
        try:
            folder = model_folder(contender, self._checkpoint, python)
            driver = await self._stack.enter_async_context(
                start_driver(
                    python, contender.driver, contender.arguments(folder, self._limits()),
                    environment(contender, python, self._options.threads), self._logs / contender.name,
                )
            )  # fmt: skip
            description = await driver.ready(_START_TIMEOUT_S)
            for case in _cases(self._options):
                output_tokens = min(case.output_tokens, _WARM_UP_TOKENS)
                await driver.generate(_prompts(case), output_tokens, _GENERATE_TIMEOUT_S)
        except (DriverError, subprocess.SubprocessError, OSError) as error:
            self.failures[contender.name] = str(error)
            _say(f"{contender.name}: {error}")
            return
        self.drivers[contender], self.descriptions[contender.name] = driver, description

    def _limits(self) -> dict[str, int]:
        options = self._options
        return {
            "--threads": options.threads,
            "--max-num-seqs": max(options.batches),
            "--max-model-tokens": 2 * max(options.prefill_tokens, DECODE_PROMPT_TOKENS + options.decode_tokens),
            "--kv-memory-bytes": _KV_MEMORY_BYTES,
        }


async def _measure(name: str, driver: Driver, case: Case, work: Work, max_others_share: float) -> list[Measurement]:
    """One measurement that nobody disturbed; before it those that somebody did, up to ``_ATTEMPTS`` in all."""
    attempts: list[Measurement] = []
    while len(attempts) < _ATTEMPTS and not (attempts and attempts[-1].is_kept):
        others = OtherProcesses(driver.pid)
        first_s = 0.0
        if case.output_tokens > 1:
            first_s = await driver.generate(_prompts(case), 1, _GENERATE_TIMEOUT_S)
        duration_s = await driver.generate(_prompts(case), case.output_tokens, _GENERATE_TIMEOUT_S)
        share = others.share()
        attempts.append(Measurement(name, case, duration_s, first_s, share, share <= max_others_share, work))
    return attempts


def _prompts(case: Case) -> list[list[int]]:
    """Fresh ones every time, so that nothing of them can be cached."""
    return [random.choices(_PROMPT_TOKEN_IDS, k=case.prompt_tokens) for _ in range(case.batch)]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(comparison: Comparison, as_markdown: bool) -> None:
    shown = sections(comparison)
    if as_markdown:
        print(f"{comparison.title()}\n\n{to_markdown(shown)}")
    else:
        Console().print(comparison.title(), to_terminal(shown), sep="\n", highlight=False, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Measure engines in turn on one machine, on the same random weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="for the checkpoint and its exports; kept for the next run")
    add("--shape", choices=sorted(SHAPES), default="qwen3-0.6b", help="of the model")
    add("--engines", nargs="+", choices=[contender.name for contender in CONTENDERS], help="in this order")
    for engine in ("vllm", "openvino", "transformers"):
        add(f"--{engine}-python", type=Path, help=f"the interpreter of an environment with {engine}")
    add("--threads", type=int, default=2, help="of each engine")
    add("--repeats", type=int, default=3, help="rounds; the tables show medians")
    add("--prefill-tokens", type=int, default=1024, help="of one prompt")
    add("--decode-tokens", type=int, default=128, help="of each request")
    add("--batches", type=int, nargs="+", default=(1, 8, 32), help="requests that decode together")
    add("--max-others", type=float, default=0.06, help="share of the cores that others may use; more is discarded")
    add("--json", type=Path, help="write everything to this file")
    add("--add", action="store_true", help="keep the measurements that the file has already")
    add("--markdown", action="store_true", help="print Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
