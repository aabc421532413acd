"""The step thread: when commands run, and what is told when something fails."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from eagleray.core.clock import Clock, ManualClock, SystemClock
from eagleray.core.config import EngineConfig
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine, StepOutcome
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.engine.scheduling.plan import StepPlan, StepResult
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText
from eagleray.workers import step_loop
from eagleray.workers.step_loop import StepLoop

DEADLINE_S = 5.0
TOKENIZER = byte_tokenizer()


class GatedExecutor:
    """Computes as the fake does; a step is over when ``gate`` is open. Step number ``fails_at`` fails."""

    def __init__(self) -> None:
        self._executor = FakeExecutor(num_blocks=32, block_size_tokens=4)
        self.layout, self.model_identity = self._executor.layout, self._executor.model_identity
        self.draft_identity = self._executor.draft_identity
        self.num_blocks, self.num_host_blocks, self.max_model_tokens = 32, 0, 100
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.fails_at: int | None = None
        self.num_begun = self.num_over = 0

    def submit(self, plan: StepPlan) -> GatedStep:
        self.num_begun += 1
        result = self._executor.submit(plan).result()
        self.begun.set()
        return GatedStep(self, self.num_begun, result)


class GatedStep:
    def __init__(self, executor: GatedExecutor, number: int, result: StepResult) -> None:
        self._executor, self._number, self._result = executor, number, result

    def result(self) -> StepResult:
        assert self._executor.gate.wait(DEADLINE_S)
        self._executor.num_over += 1
        if self._number == self._executor.fails_at:
            raise RuntimeError("the device is gone")
        return self._result


class Bench:
    """A loop and what it told."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.executor = GatedExecutor()
        self.num_ticks = 0
        self.num_untold = 0  # ticks that do not tell all
        self.num_idles = 0
        engine = Engine(
            self.executor, EngineConfig(), SystemClock(), lambda spec: OutputText(TOKENIZER, spec.sampling, ())
        )
        self.told: list[object] = []  # positions of tokens, and failures, in order
        self.failed = threading.Event()
        self.changed = threading.Condition()
        self.loop = StepLoop(
            engine, clock or SystemClock(), self._on_step, self._on_tick, self._on_failure, self._on_long_idle
        )

    def _on_step(self, outcome: StepOutcome, step_s: float) -> None:
        assert step_s >= 0
        with self.changed:
            self.told.extend(output.position for output in outcome.outputs)
            self.changed.notify_all()

    def _on_tick(self) -> bool:
        with self.changed:
            self.num_ticks += 1
            self.changed.notify_all()
            return self.num_ticks > self.num_untold

    def _on_long_idle(self) -> None:
        with self.changed:
            self.num_idles += 1
            self.changed.notify_all()

    def _on_failure(self, error: BaseException) -> None:
        self.told.append(error)
        self.failed.set()

    def until(self, holds: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(holds, DEADLINE_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    made.loop.start()
    yield made
    made.executor.gate.set()
    made.loop.stop(DEADLINE_S)


def add(engine: Engine, max_tokens: int = 4) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    engine.add(RequestSpec(request_id="a", token_ids=(5, 6, 7), num_prompt_tokens=3, sampling=sampling))


def test_every_token_is_told_once_and_in_order(bench: Bench) -> None:
    bench.executor.gate.set()
    bench.loop.call(add)
    bench.until(lambda: len(bench.told) == 4)
    assert bench.told == [0, 1, 2, 3]


def test_a_command_that_comes_during_a_step_runs_when_it_is_over_and_before_the_next(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    ran = threading.Event()

    def command(engine: Engine) -> None:
        seen.append((bench.executor.num_begun, bench.executor.num_over))
        ran.set()

    bench.loop.call(add)
    assert bench.executor.begun.wait(DEADLINE_S)
    bench.loop.call(command)
    bench.executor.gate.set()
    assert ran.wait(DEADLINE_S)
    assert seen == [(1, 1)]


def test_what_the_last_step_brought_is_told_before_the_failure_of_the_next(bench: Bench) -> None:
    bench.executor.fails_at = 3
    bench.executor.gate.set()
    bench.loop.call(add)
    assert bench.failed.wait(DEADLINE_S)
    assert bench.told[:2] == [0, 1] and isinstance(bench.told[2], RuntimeError)


def test_what_the_last_step_brought_is_told_even_if_a_command_fails_after_it(bench: Bench) -> None:
    bench.loop.call(add)
    assert bench.executor.begun.wait(DEADLINE_S)
    bench.loop.call(lambda engine: 1 / 0)  # type: ignore[arg-type,return-value]
    bench.executor.gate.set()
    assert bench.failed.wait(DEADLINE_S)
    assert bench.told[0] == 0 and isinstance(bench.told[1], ZeroDivisionError)


def test_a_loop_that_has_nothing_to_do_is_in_no_step_however_long_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "LAST_LOOK_S", 0.0)
    clock = ManualClock()
    bench = Bench(clock)
    bench.loop.start()
    bench.loop.call(lambda engine: None)
    bench.until(lambda: bench.num_ticks == 2)  # after the command, and once more
    clock.advance(10.0)
    deadline_s = time.monotonic() + DEADLINE_S
    while bench.loop.step_running_s:  # until it has begun to wait
        assert time.monotonic() < deadline_s

    def be_long(engine: Engine) -> None:
        clock.advance(3.0)
        bench.told.append(bench.loop.step_running_s)

    bench.loop.call(be_long)
    bench.until(lambda: bench.num_ticks >= 3)
    assert bench.told == [3.0]
    bench.loop.stop(DEADLINE_S)


def test_the_thread_looks_up_until_everything_is_told_and_then_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "LAST_LOOK_S", 0.0)
    bench = Bench()
    bench.num_untold = 5
    bench.loop.start()
    bench.loop.call(lambda engine: None)
    bench.until(lambda: bench.num_ticks >= 6)  # five that had not the time, and the one that had
    ticks_when_called: queue.SimpleQueue[int] = queue.SimpleQueue()
    bench.loop.call(lambda engine: ticks_when_called.put(bench.num_ticks))
    assert ticks_when_called.get(timeout=DEADLINE_S) == 6
    bench.loop.stop(DEADLINE_S)


def test_that_it_is_idle_is_told_once_after_the_start_and_once_after_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_loop, "LAST_LOOK_S", 0.0)
    monkeypatch.setattr(step_loop, "LONG_IDLE_S", 0.0)
    bench = Bench()
    bench.executor.gate.set()
    bench.loop.start()
    bench.until(lambda: bench.num_idles == 1)
    num_ticks = bench.num_ticks
    bench.loop.call(lambda engine: None)
    bench.until(lambda: bench.num_ticks >= num_ticks + 2)  # after the command, and once more
    assert bench.num_idles == 1
    bench.loop.call(add)
    bench.until(lambda: bench.num_idles == 2)
    assert bench.told == [0, 1, 2, 3]
    bench.loop.stop(DEADLINE_S)
