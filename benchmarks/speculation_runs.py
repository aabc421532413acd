"""Offline engines that guess, or do not, answering the same prompts in turns under a stopwatch."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from interference import undisturbed

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.clock import SystemClock
from eagleray.core.config import Config, SpeculationConfig
from eagleray.core.errors import ConfigError
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution.executor import LocalExecutor, LocalStep, build_executor
from eagleray.engine.scheduling.plan import StepPlan, StepResult
from eagleray.engine.speculation.build import build_draft_policy
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.output import OutputText
from eagleray.text.tokenizer import Tokenizer

NO_SPECULATION: Final = "none"
_IDLE_DRAFT_SHARE: Final = 0.1  # of a step: so long takes no guess

Item = TypeVar("Item")


@dataclass(frozen=True)
class DecodingStep:
    """A step in which every request only decoded."""

    num_requests: int
    num_guesses: int  # that it verified, of all requests
    verify_s: float
    draft_s: float
    wall_s: float  # from the end of the step before to its own

    @property
    def outside_s(self) -> float:
        """Neither computing nor guessing: scheduling, Python, text where that takes longer than the step computes."""
        return self.wall_s - self.verify_s - self.draft_s

    @property
    def is_plain(self) -> bool:
        """Neither guesses nor verifies; what guesses has little to do then."""
        return self.num_guesses == 0 and self.draft_s < _IDLE_DRAFT_SHARE * self.verify_s


@dataclass(frozen=True)
class Round:
    """All prompts of a round answered by one engine, so many at a time."""

    contender: str
    batch: int
    duration_s: float
    num_tokens: int
    acceptance: Acceptance | None
    answers: Sequence[Sequence[int]]
    steps: Sequence[DecodingStep]
    prefill_s: float = 0.0  # of its duration, steps that computed some prompt
    others_share: float = 0.0  # of the cores, what other processes used during this round of all contenders
    engines: int = 0  # which, of those that were built one after the other

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.duration_s


class StepTimer:
    """An ``EngineExecutor`` that notes what steps took."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self.layout, self.model_identity = executor.layout, executor.model_identity
        self.draft_identity = executor.draft_identity
        self.num_blocks, self.num_host_blocks = executor.num_blocks, executor.num_host_blocks
        self.max_model_tokens = executor.max_model_tokens
        self.begin()

    def begin(self) -> None:
        """A round begins."""
        self.steps: list[DecodingStep] = []
        self.prefill_s = 0.0
        self._last_end_s = time.perf_counter()

    def submit(self, plan: StepPlan) -> TimedStep:
        return TimedStep(plan, self._executor.submit(plan), self)

    def note(self, plan: StepPlan, result: StepResult) -> None:
        """A step has ended just now."""
        end_s = time.perf_counter()
        wall_s, self._last_end_s = end_s - self._last_end_s, end_s
        if plan.runs and all(run.num_tokens == 1 and run.samples for run in plan.runs):
            num_guesses = sum(run.num_rows - 1 for run in plan.runs)
            self.steps.append(DecodingStep(len(plan.runs), num_guesses, result.verify_s, result.draft_s, wall_s))
        else:
            self.prefill_s += wall_s


@dataclass(frozen=True)
class TimedStep:
    """A step that was submitted."""

    plan: StepPlan
    step: LocalStep
    timer: StepTimer

    def result(self) -> StepResult:
        result = self.step.result()
        self.timer.note(self.plan, result)
        return result


class Contender:
    """One engine; no prefix is ever cached, so that every round is the same work."""

    def __init__(
        self,
        name: str,
        config: Config,
        speculation: SpeculationConfig | None,
        temperature: float = 0.0,
        never_guesses: bool = False,
    ) -> None:
        """With ``never_guesses`` a draft is there and kept up to date, for nothing.

        Raises ``ConfigError`` for a draft that does not go with the model."""
        self.name, self.speculation, self._temperature = name, speculation, temperature
        engine = config.decode.engine
        self._tokenizer = Tokenizer.from_folder(config.model.folder)
        self._executor = build_executor(
            config.model, engine, num_threads=config.decode.num_threads, speculation=speculation
        )
        self.model_config = self._executor.model_config
        self._timer = StepTimer(self._executor)
        policy = build_draft_policy(None if never_guesses else speculation, self._executor.has_draft_network)
        self._engine = Engine(self._timer, engine, SystemClock(), self._new_text, policy)
        self._numbers = itertools.count()

    def close(self) -> None:
        self._executor.close()

    def answer(self, prompts: Sequence[Sequence[int]], batch: int, max_tokens: int) -> Round:
        """``batch`` at a time: a new prompt begins when an answer ends. A prompt's place in the round is its seed."""
        self._timer.begin()
        waiting = list(enumerate(prompts))[::-1]
        answers: list[list[int]] = [[] for _ in prompts]
        places: dict[str, int] = {}
        acceptances: list[Acceptance | None] = []
        start_s = time.perf_counter()
        while waiting or places:
            while waiting and len(places) < batch:
                place, token_ids = waiting.pop()
                places[self._add(token_ids, max_tokens, seed=place)] = place
            outcome = self._engine.step()
            acceptances.append(outcome.acceptance)
            for output in outcome.outputs:
                answers[places[output.request_id]].extend(output.token_ids)
                if output.finish_reason is not None:
                    del places[output.request_id]
        duration_s = time.perf_counter() - start_s
        num_tokens = sum(map(len, answers))
        acceptance = total_acceptance(acceptances)
        steps, prefill_s = tuple(self._timer.steps), self._timer.prefill_s
        return Round(self.name, batch, duration_s, num_tokens, acceptance, answers, steps, prefill_s)

    def fill(self, prompts: Sequence[Sequence[int]], batch: int, max_tokens: int) -> None:
        """From now on ``take_steps`` answers them again and again, so many at a time. As the next step is under way
        when an answer is known to have ended, that one goes without a request in its place."""
        # The first answers end one after the other, as later ones do.
        first_lengths = [max(1, max_tokens * (place + 1) // batch) for place in range(batch)]
        lengths = itertools.chain(first_lengths, itertools.repeat(max_tokens))
        self._waiting = zip(itertools.cycle(enumerate(prompts)), lengths, strict=False)
        self._batch, self._running = batch, set[str]()

    def take_steps(self, num_steps: int) -> Round:
        """Up to the end of a step, so that nothing computes while others have their turn. Answers are not kept."""
        self._timer.begin()
        acceptances: list[Acceptance | None] = []
        num_tokens, start_s = 0, time.perf_counter()
        for _ in range(num_steps):
            while len(self._running) < self._batch:
                (place, token_ids), max_tokens = next(self._waiting)
                self._running.add(self._add(token_ids, max_tokens, seed=place))
            outcome = self._engine.step()
            acceptances.append(outcome.acceptance)
            for output in outcome.outputs:
                num_tokens += len(output.token_ids)
                if output.finish_reason is not None:
                    self._running.remove(output.request_id)
        self._engine.wait()
        duration_s = time.perf_counter() - start_s
        steps, prefill_s = tuple(self._timer.steps), self._timer.prefill_s
        acceptance = total_acceptance(acceptances)
        return Round(self.name, self._batch, duration_s, num_tokens, acceptance, (), steps, prefill_s)

    def empty(self) -> None:
        """Whatever still runs is given up."""
        for request_id in self._running:
            self._engine.end(request_id)
        while not self._engine.step().is_idle:
            pass

    def _add(self, token_ids: Sequence[int], max_tokens: int, seed: int) -> str:
        request_id = str(next(self._numbers))
        spec = RequestSpec(
            request_id=request_id,
            token_ids=tuple(token_ids),
            num_prompt_tokens=len(token_ids),
            sampling=SamplingParams(temperature=self._temperature, max_tokens=max_tokens, seed=seed),
            eos_token_ids=self.model_config.eos_token_ids,
        )
        self._engine.add(spec)
        return request_id

    def _new_text(self, spec: RequestSpec) -> OutputText:
        return OutputText(self._tokenizer, spec.sampling, spec.token_ids)


@contextlib.contextmanager
def computing_on_one_core() -> Iterator[None]:
    """All threads but the calling one share a core, which it leaves to them: two cores of a machine that others use as
    well differ by up to a tenth for seconds, and so would engines that compute on different ones. For engines of one
    thread each that have computed before, so that their threads are there. Nothing happens where there is one core, or
    no Linux."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(cores) > 1:
        for thread in _other_threads():
            os.sched_setaffinity(thread, cores[-1:])
        os.sched_setaffinity(0, cores[:-1])
    try:
        yield
    finally:
        for thread in (0, *_other_threads()) if cores else ():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(thread, cores)


def _other_threads() -> list[int]:
    own = threading.get_native_id()
    return [int(thread) for thread in os.listdir("/proc/self/task") if int(thread) != own]


def read_prompts(path: Path, model: Path) -> list[list[int]]:
    """Token ids of a JSONL file whose lines have ``messages``, for the model's chat template, or ``prompt``, a text.

    Raises ``ConfigError`` naming the line.
    """
    tokenizer = Tokenizer.from_folder(model)
    template = ChatTemplate.from_folder(model, tokenizer)
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry: Mapping[str, Any] = json.loads(line)
            text = template.render(entry["messages"]) if "messages" in entry else entry["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            way_out = f"needs messages or prompt in a JSON object ({error!r})"
            raise ConfigError("--prompts", f"{path}:{number}", way_out) from None
        prompts.append(list(tokenizer.encode(text)))
    return prompts


def in_turns(
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]],
    batch: int,
    max_tokens: int,
    repeats: int,
    untimed: int = 1,
) -> list[list[Round]]:
    """Per repeat, one round of each contender over the same prompts, in the order of ``contenders``. One that others
    disturb is tried again as a whole, so that rounds that are compared stay neighbours. The first ones, untimed, let
    controllers learn. Every repeat begins with another prompt, so that those that decode together differ, and with
    another contender: A B C, B C A, C A B."""
    repeated = []
    for repeat in range(untimed + repeats):
        answer_all = partial(_answer_all, contenders, repeat, turned(prompts, repeat * batch), batch, max_tokens)
        if repeat < untimed:
            answer_all()
            continue
        rounds, others_share = undisturbed(answer_all)
        repeated.append([replace(taken, others_share=others_share) for taken in rounds])
    return repeated


def in_short_turns(
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]],
    batch: int,
    max_tokens: int,
    num_turns: int,
    untimed: int,
    num_steps: int,
) -> list[list[Round]]:
    """As ``in_turns``, but a turn is ``num_steps`` steps, and whenever an answer ends another begins: what a machine's
    speed does within seconds then meets all contenders alike. There are no answers to compare."""
    for contender in contenders:
        contender.fill(prompts, batch, max_tokens)
    turns = []
    for turn in range(untimed + num_turns):
        take_all = partial(_take_all, contenders, turn, num_steps)
        if turn < untimed:
            take_all()
            continue
        rounds, others_share = undisturbed(take_all)
        turns.append([replace(taken, others_share=others_share) for taken in rounds])
    for contender in contenders:
        contender.empty()
    return turns


def _take_all(contenders: Sequence[Contender], first: int, num_steps: int) -> list[Round]:
    rounds = {place: contenders[place].take_steps(num_steps) for place in turned(range(len(contenders)), first)}
    return [rounds[place] for place in range(len(contenders))]


def _answer_all(
    contenders: Sequence[Contender], first: int, prompts: Sequence[Sequence[int]], batch: int, max_tokens: int
) -> list[Round]:
    """``first`` says who begins, not the order of what is returned."""
    order = turned(range(len(contenders)), first)
    rounds = {place: contenders[place].answer(prompts, batch, max_tokens) for place in order}
    return [rounds[place] for place in range(len(contenders))]


def turned(items: Sequence[Item], first: int) -> list[Item]:
    """From one of them on, and round to it again."""
    first %= len(items)
    return [*items[first:], *items[:first]]
