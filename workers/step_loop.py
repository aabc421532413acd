"""The step thread: the only thread that touches an engine. Everything else sends it commands."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Final

from eagleray.core.clock import Clock
from eagleray.engine.engine import Engine, StepOutcome

Command = Callable[[Engine], None]

# After something was done the thread looks up once more, to tell what has become of it. Then it sleeps until it is
# called: on a quiet machine a thread that was asleep needs most of a millisecond for a look.
LAST_LOOK_S: Final = 0.1
LONG_IDLE_S: Final = 5.0


class StepLoop:
    """Runs the engine's loop while there is work. On its thread are called ``on_step(outcome, step_s)``; ``on_tick()``,
    which returns False while there is something left to tell later; ``on_long_idle()``, once after the start and after
    work, when nothing has come for a while; and ``on_failure(error)`` when one of these, a step or a command raised,
    after which nothing is computed any more."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        on_step: Callable[[StepOutcome, float], None],
        on_tick: Callable[[], bool],
        on_failure: Callable[[BaseException], None],
        on_long_idle: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._on_step, self._on_tick, self._on_failure = on_step, on_tick, on_failure
        self._on_long_idle = on_long_idle
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._step_start_s = clock.now_s()
        self._turn_start_s: float | None = None  # None: the thread waits for something to do
        self._is_idle = True  # nothing is being computed
        self._has_settled = True  # and nothing is left to tell
        self._has_worked = True  # since it was idle for long
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def step_running_s(self) -> float:
        """How long the turn under way has been running: one step, commands, one tick; 0 while there is nothing to do.
        From any thread."""
        start_s = self._turn_start_s
        return 0.0 if start_s is None else self._clock.now_s() - start_s

    def start(self) -> None:
        self._thread.start()

    def call(self, command: Command) -> None:
        """Have ``command(engine)`` run when one step is over and the next has not begun. From any thread; returns at
        once."""
        self._commands.put(command)

    def stop(self, deadline_s: float) -> None:
        self._stopping.set()
        self.call(lambda engine: None)
        if self._thread.is_alive():
            self._thread.join(deadline_s)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn_start_s = self._clock.now_s()
                self._turn()
        except BaseException as error:
            self._on_failure(error)

    def _turn(self) -> None:
        """The step under way ends, commands that came meanwhile are run, the next step begins; while it computes, what
        the last one brought is told, even if nothing can follow it."""
        self._engine.wait()
        step_s = self._clock.now_s() - self._step_start_s
        try:
            was_idle = self._is_idle
            has_commands = self._run_commands(wait=was_idle)
            self._step_start_s = self._clock.now_s()
            self._is_idle = not self._engine.begin()
        finally:
            outcome = self._engine.report()
            if outcome is not None:
                self._has_worked = True
                self._on_step(outcome, step_s)
        self._has_settled = self._on_tick() and was_idle and not has_commands

    def _run_commands(self, wait: bool) -> bool:
        """All commands that are there; with ``wait``, give the first one a while to come. False: there was none."""
        try:
            command = self._next_command() if wait else self._commands.get_nowait()
        except queue.Empty:
            return False
        with contextlib.suppress(queue.Empty):
            while True:
                command(self._engine)
                command = self._commands.get_nowait()
        return True

    def _next_command(self) -> Command:
        self._turn_start_s = None
        try:
            if not self._has_settled:
                return self._commands.get(timeout=LAST_LOOK_S)
            if self._has_worked:
                with contextlib.suppress(queue.Empty):
                    return self._commands.get(timeout=LONG_IDLE_S)
                self._has_worked = False
                self._on_long_idle()
            return self._commands.get()
        finally:
            self._turn_start_s = self._clock.now_s()
