"""An offline engine under a stopwatch: prompts in, the time of every step out."""

from __future__ import annotations

import itertools
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch

from eagleray.core.clock import SystemClock
from eagleray.core.config import Config
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine, StepOutcome
from eagleray.engine.execution.executor import LocalExecutor, LocalStep, build_executor
from eagleray.engine.scheduling.plan import StepPlan, StepResult
from eagleray.kernels.native import build as native
from eagleray.kernels.replay.api import ComputeAnew
from eagleray.kernels.select import Kernels, load_best_library, native_kernels
from eagleray.models.registry import load_model_config
from eagleray.text.output import OutputText
from eagleray.text.tokenizer import Tokenizer

PROMPT_TOKENS: Final = 32  # of the requests that decode
_FIRST_ID, _NUM_IDS = 8, 240  # prompts are made of these, which every vocabulary here has
_UNTIMED_STEPS: Final = 4  # after all requests of a batch have begun
_DECLARATIONS: Final = Path(native.__file__).with_name("operations.h")
_PANEL_WEIGHT_BYTES: Final = {0: 2.0, 1: 1.0, 2: 0.5, 3: 1.0}  # enum weights in panels.h
_ELEMENT_BYTES: Final = {0: 4.0, 1: 2.0}  # enum element in vectors.h


@dataclass(slots=True)
class Operation:
    """What one kernel did, over all its calls."""

    seconds: float = 0.0
    flop: float = 0.0  # of products with weights; 0: not counted
    weight_bytes: float = 0.0  # that they read; 0: not counted


@dataclass(slots=True)
class StepParts:
    """Seconds of steps that follow one another, over all of them."""

    loop_s: float = 0.0  # from a step's end as the loop learns of it to the next one's submission
    hand_over_s: float = 0.0  # from there to the other thread and back, beside what that one does
    executor_s: float = 0.0  # kernels, and what is beside them in the executor


@dataclass(frozen=True)
class Decoding:
    """Requests that decode together. Durations are from one step's outputs to the next one's."""

    batch: int
    step_s: Sequence[float]
    by_operation: Mapping[str, Operation]  # of all these steps, when kernels are timed
    num_calls: int  # of Python and C functions in all these steps, when they are counted
    parts: StepParts

    @property
    def kernel_s(self) -> float:
        return sum(operation.seconds for operation in self.by_operation.values())


class KernelClock:
    """Adds up the time that kernels take. Of kernels that call each other the innermost counts."""

    def __init__(self) -> None:
        self.by_operation: defaultdict[str, Operation] = defaultdict(Operation)
        self._num_calls = 0

    def timed(self, kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls_before, start_s = self._num_calls, time.perf_counter()
            result = kernel(*arguments)
            if self._num_calls == calls_before:
                self._note(name, time.perf_counter() - start_s, _product(name, arguments))
            return result

        return call

    def _note(self, name: str, duration_s: float, product: _Product | None) -> None:
        operation = self.by_operation[name if product is None else f"{name} {product}"]
        operation.seconds += duration_s
        if product is not None:
            operation.flop += product.flop
            operation.weight_bytes += product.weight_bytes
        self._num_calls += 1

    def taken(self) -> dict[str, Operation]:
        """What was added up so far; it begins anew."""
        taken = dict(self.by_operation)
        self.by_operation.clear()
        return taken

    def kernels(self, config: Config, dtype: torch.dtype, has_replay: bool) -> Kernels:
        """The native ones, timed without the Python around them. With replay the calls of a recorded step are one
        operation, ``run_program``. Raises ``NativeUnavailable``."""
        library = load_best_library(config.decode.num_threads)
        functions = {field.name: getattr(library, field.name) for field in fields(library)}
        timed: dict[str, Any] = {
            name: self.timed(function, name) for name, function in functions.items() if callable(function)
        }
        kernels = native_kernels(replace(library, **timed), dtype, config.model.quantization)
        return kernels if has_replay else replace(kernels, new_replayer=ComputeAnew)


@dataclass(frozen=True)
class _Product:
    """A call in operations.h that multiplies with weights."""

    rows: int
    in_features: int
    out_features: int
    bytes_per_weight: float

    def __str__(self) -> str:
        return f"{self.in_features} x {self.out_features}"

    @property
    def flop(self) -> float:
        return 2.0 * self.rows * self.in_features * self.out_features

    @property
    def weight_bytes(self) -> float:
        return self.bytes_per_weight * self.in_features * self.out_features


def _argument_names(function: str) -> list[str]:
    """In order, as the declaration in C has them."""
    declaration = re.search(rf"^\w+ {function}\(([^)]*)\);", _DECLARATIONS.read_text(encoding="utf-8"), re.MULTILINE)
    assert declaration is not None, f"{_DECLARATIONS} does not declare {function}"
    return [argument.split()[-1].lstrip("*") for argument in declaration[1].split(",")]


_PRODUCTS: Final = {name: _argument_names(name) for name in ("panel_linear", "linear")}


def _product(name: str, arguments: Sequence[Any]) -> _Product | None:
    if name not in _PRODUCTS:
        return None
    named = dict(zip(_PRODUCTS[name], arguments, strict=True))
    bytes_per_weight = (
        _PANEL_WEIGHT_BYTES[named["weights"]] if name == "panel_linear" else _ELEMENT_BYTES[named["element"]]
    )
    return _Product(named["rows"], named["in_features"], named["out_features"], bytes_per_weight)


class CallCounter:
    """Counts calls of Python and C functions, on this thread and on those that start while it is entered."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._is_over = False

    def __enter__(self) -> CallCounter:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(None)
        self._is_over = True

    @property
    def num_calls(self) -> int:
        return self._counts["call"] + self._counts["c_call"]

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if self._is_over:
            sys.setprofile(None)  # on the other threads only they themselves can
        else:
            self._counts[event] += 1


class StampedExecutor:
    """Any executor, and when the loop submits its steps and learns of their ends."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self._known_s = time.perf_counter()
        self._parts = StepParts()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def submit(self, plan: StepPlan) -> _StampedStep:
        submitted_s = time.perf_counter()
        self._parts.loop_s += submitted_s - self._known_s
        return _StampedStep(self._executor.submit(plan), partial(self._note, submitted_s))

    def _note(self, submitted_s: float, result: StepResult) -> None:
        self._known_s, executor_s = time.perf_counter(), result.verify_s + result.draft_s
        self._parts.executor_s += executor_s
        self._parts.hand_over_s += self._known_s - submitted_s - executor_s

    def taken(self) -> StepParts:
        taken, self._parts = self._parts, StepParts()
        return taken


@dataclass(frozen=True)
class _StampedStep:
    step: LocalStep
    note: Callable[[StepResult], None]

    def result(self) -> StepResult:
        result = self.step.result()
        self.note(result)
        return result


class BenchmarkEngine:
    """One model and its engine; every prompt is a new one, so that no prefix is ever cached."""

    def __init__(
        self,
        config: Config,
        clock: KernelClock | None = None,
        counter: CallCounter | None = None,
        has_replay: bool = True,  # without a clock it always has
    ) -> None:
        self.config = config
        self.model_config = load_model_config(config.model.folder)
        self.dtype = self.model_config.resolve_dtype(config.model.dtype, "cpu")
        self._tokenizer = Tokenizer.from_folder(config.model.folder)
        self._clock, self._counter = clock or KernelClock(), counter or CallCounter()
        num_threads = config.decode.num_threads
        kernels = clock.kernels(config, getattr(torch, self.dtype), has_replay) if clock else None
        self._executor: LocalExecutor = build_executor(
            config.model, config.decode.engine, num_threads=num_threads, kernels=kernels
        )
        self.computes_with = self._executor.computes_with
        self._stamped = StampedExecutor(self._executor)
        self._engine = Engine(self._stamped, config.decode.engine, SystemClock(), self._new_text)
        self._numbers = itertools.count(1)

    def close(self) -> None:
        self._executor.close()

    def prefill(self, num_tokens: int) -> float:
        """Seconds until the first token of a prompt of so many."""
        self._add(num_tokens, max_tokens=1)
        start_s = time.perf_counter()
        while self._engine.has_work:
            self._engine.step()
        return time.perf_counter() - start_s

    def decode(self, batch: int, num_steps: int) -> Decoding:
        """Steps of ``batch`` requests that all decode, ``num_steps`` of them."""
        for _ in range(batch):
            self._add(PROMPT_TOKENS, max_tokens=num_steps + _UNTIMED_STEPS + batch)
        while self._decoding(self._engine.step()) < batch:
            pass
        for _ in range(_UNTIMED_STEPS):
            self._engine.step()
        self._clock.taken()
        self._stamped.taken()
        calls_before = self._counter.num_calls
        ends_s = [time.perf_counter()]
        for _ in range(num_steps):
            self._engine.step()
            ends_s.append(time.perf_counter())
        step_s = [b - a for a, b in itertools.pairwise(ends_s)]
        num_calls = self._counter.num_calls - calls_before
        result = Decoding(batch, step_s, self._clock.taken(), num_calls, self._stamped.taken())
        self._end_all()
        return result

    @staticmethod
    def _decoding(outcome: StepOutcome) -> int:
        return len(outcome.outputs) if outcome.decode_only else 0

    def _end_all(self) -> None:
        for request in list(self._engine.scheduler):
            self._engine.end(request.request_id)

    def _add(self, num_tokens: int, max_tokens: int) -> None:
        number = next(self._numbers)
        token_ids = tuple(
            _FIRST_ID + (number * 7919 + place * (number % 13 + 1)) % _NUM_IDS for place in range(num_tokens)
        )
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=number)
        self._engine.add(
            RequestSpec(
                request_id=str(number), token_ids=token_ids, num_prompt_tokens=num_tokens, sampling=sampling,
                tenant_salt=str(number),
            )
        )  # fmt: skip

    def _new_text(self, spec: RequestSpec) -> OutputText:
        return OutputText(self._tokenizer, spec.sampling, spec.token_ids)
