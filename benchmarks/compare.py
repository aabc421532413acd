"""Engines beside each other on one machine, in turn: each in its own process and its own Python, on the same weights.

    python benchmarks/compare.py --folder models --vllm-python vllm/bin/python --openvino-python openvino/bin/python \
        --transformers-python transformers/bin/python --json result.json

The engines stay loaded: ``--engines`` names as many as memory holds. A long comparison can be made in pieces: with
``--json FILE --add`` what FILE holds is kept, and the tables are of everything. FILE is written after every round.
``results/README.md`` says how to read the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from comparison import Case, Comparison, Measurement, Piece, read_comparison, sections, write_comparison
from contenders import CONTENDERS, DEFAULT_ENGINES, Contender, Pythons, default_pythons, environment, model_folder
from driver import Driver, DriverError, end_on_sigterm, start_driver
from floors import Work, measure_machine, step_work
from interference import MAX_OTHERS_SHARE, attempts
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
_SETTLE_S: Final = 1.0  # threads of the engine before may still spin, waiting for work
_PROMPT_TOKEN_IDS: Final = range(FIRST_TEXT_TOKEN_ID, 1024)  # every shape has these
_KV_MEMORY_BYTES: Final = 2 * 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when every engine that was asked for could be measured."""
    options = _parser().parse_args(arguments)
    before = read_comparison(options.json) if options.add and options.json.exists() else Comparison(())

    def keep(piece: Piece) -> None:
        if options.json:
            write_comparison(options.json, Comparison((*before.pieces, piece)))

    piece = asyncio.run(measure(options, keep))
    _show(Comparison((*before.pieces, piece)), options.markdown)
    return 1 if piece.not_measured.keys() & set(options.engines) else 0


async def measure(options: argparse.Namespace, keep: Callable[[Piece], None]) -> Piece:
    """Start all engines, then go round and round: A B C A B C. ``keep`` gets what there is after every round."""
    end_on_sigterm()
    pythons = default_pythons(
        vllm=options.vllm_python, openvino=options.openvino_python, transformers=options.transformers_python
    )
    contenders = list(pythons.chosen(options.engines))
    checkpoint = checkpoint_folder(options.shape, options.folder)
    config = load_model_config(checkpoint)
    dtypes = dict.fromkeys(contender.dtype for contender in contenders)
    machines = {dtype: measure_machine(dtype, options.threads) for dtype in dtypes}
    async with AsyncExitStack() as stack:
        started = _Started(options, pythons, checkpoint, stack)
        for contender in contenders:
            await started.start(contender)
        piece = Piece(
            provenance(), options.shape, options.threads, machines, started.descriptions,
            pythons.left_out(options.engines) | started.failures, (),
        )  # fmt: skip
        for round_number in range(1, options.repeats + 1):
            measurements = await _measure_round(started, config, options, round_number)
            failures = {**piece.not_measured, **started.failures}
            piece = replace(piece, measurements=(*piece.measurements, *measurements), not_measured=failures)
            keep(piece)
    return piece


async def _measure_round(
    started: _Started, config: ModelConfig, options: argparse.Namespace, round_number: int
) -> list[Measurement]:
    """Every case of one engine after the other; one that fails is left alone from then on."""
    measurements: list[Measurement] = []
    for contender, driver in list(started.drivers.items()):
        await asyncio.sleep(_SETTLE_S)
        try:
            for case in _cases(options):
                work = _work(config, contender, case)
                measurements += await _measure(contender, driver, case, work, round_number, options.max_others)
                _say(f"round {round_number}, {contender.name}, {case.name}: {_spoken(measurements[-1])}")
        except DriverError as error:
            started.fail(contender, error)
    return measurements


def _spoken(measurement: Measurement) -> str:
    state = "" if measurement.is_kept else ", discarded"
    return f"{measurement.tokens_per_s:,.1f} tokens/s, others {measurement.others_share:.1%}{state}"


def _work(config: ModelConfig, contender: Contender, case: Case) -> Work:
    """One yardstick for all that have the same weights: products and K and V in the contender's dtype."""
    first, last = 0, case.prompt_tokens
    if case.kind == "decode":
        first = case.prompt_tokens + case.output_tokens // 2
        last = first + 1
    return step_work(config, contender.dtype, contender.bytes_per_weight, first, last, case.batch)


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
            self.fail(contender, error)
            return
        self.drivers[contender] = driver
        self.descriptions[contender.name] = {
            **description, "dtype": contender.dtype, "kv": contender.kv, "has_tcmalloc": driver.has_loaded("tcmalloc"),
            "in_huge_pages": driver.share_in_huge_pages(".packed"),
        }  # fmt: skip

    def fail(self, contender: Contender, error: Exception) -> None:
        """It is asked nothing any more, and takes no time from the others."""
        self.failures[contender.name] = str(error)
        if driver := self.drivers.pop(contender, None):
            driver.kill()
        _say(f"{contender.name}: {error}")

    def _limits(self) -> dict[str, int]:
        options = self._options
        return {
            "--threads": options.threads,
            "--max-num-seqs": max(options.batches),
            "--max-model-tokens": 2 * max(options.prefill_tokens, DECODE_PROMPT_TOKENS + options.decode_tokens),
            "--kv-memory-bytes": _KV_MEMORY_BYTES,
        }


async def _measure(
    contender: Contender, driver: Driver, case: Case, work: Work, round_number: int, max_others_share: float
) -> list[Measurement]:
    """One measurement that nobody disturbed, before it those that somebody did; or only such."""
    found: list[Measurement] = []
    await driver.generate(_prompts(case), 1, _GENERATE_TIMEOUT_S)  # the caches are still those of the engine before
    for attempt in attempts(max_others_share, driver.pid):
        first_s = 0.0
        if case.output_tokens > 1:
            first_s = await driver.generate(_prompts(case), 1, _GENERATE_TIMEOUT_S)
        duration_s = await driver.generate(_prompts(case), case.output_tokens, _GENERATE_TIMEOUT_S)
        share = attempt.end()
        found.append(
            Measurement(
                contender.name, contender.dtype, round_number, case, duration_s, first_s, share,
                share <= max_others_share, work,
            )
        )  # fmt: skip
    return found


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
    names = [contender.name for contender in CONTENDERS]
    add("--engines", nargs="+", choices=names, default=DEFAULT_ENGINES, help="in this order")
    for engine in ("vllm", "openvino", "transformers"):
        add(f"--{engine}-python", type=Path, help=f"the interpreter of an environment with {engine}")
    add("--threads", type=int, default=2, help="of each engine")
    add("--repeats", type=int, default=3, help="rounds; the tables show medians")
    add("--prefill-tokens", type=int, default=1024, help="of one prompt")
    add("--decode-tokens", type=int, default=128, help="of each request")
    add("--batches", type=int, nargs="+", default=(1, 8, 32), help="requests that decode together")
    add(
        "--max-others",
        type=float,
        default=MAX_OTHERS_SHARE,
        help="share of the cores that others may use; more is discarded",
    )
    add("--json", type=Path, help="write everything to this file")
    add("--add", action="store_true", help="keep the measurements that the file has already")
    add("--markdown", action="store_true", help="print Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
