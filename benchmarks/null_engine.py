"""An executor that computes nothing: what remains of a request's cost is the serving plane's.

The steps of a request last ``seed`` microseconds, of all that a step computes the longest: a client sets the pace of
what it measures, and one running service serves every part of a benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from eagleray.core.config import EngineConfig, ModelConfigSection, SpeculationConfig
from eagleray.core.request import RequestSpec
from eagleray.engine.execution.core_turns import CoreTurns
from eagleray.engine.execution.fake import fake_layout
from eagleray.engine.execution.kv_memory import KVMemory
from eagleray.engine.scheduling.plan import SampledToken, StepPlan, StepResult

MAX_MODEL_TOKENS: Final = 2**17
NUM_BLOCKS: Final = 2**17
_LETTERS: Final = tuple(range(ord("a"), ord("z") + 1))
_MAX_STEP_S: Final = 1.0


class NullExecutor:
    """Implements ``WorkerExecutor``. ``letter_ids``: the tokens that it says, over and over."""

    has_draft_network = False
    computes_with = "nothing: the executor is empty"

    def __init__(self, block_size_tokens: int, letter_ids: tuple[int, ...], shared_kv: bool = False) -> None:
        self.layout = fake_layout(block_size_tokens)
        self.num_blocks, self.num_host_blocks = NUM_BLOCKS, 0
        self.max_model_tokens = MAX_MODEL_TOKENS
        self.model_identity, self.draft_identity = "null", ""
        self.kv = KVMemory(self.layout, NUM_BLOCKS, shared_kv)
        self._tokens = tuple(map(SampledToken, letter_ids))
        self._busy_until_s = 0.0

    def submit(self, plan: StepPlan) -> NullStep:
        step_s = max((_step_s(run.spec) for run in plan.runs), default=0.0)
        self._busy_until_s = max(self._busy_until_s, time.monotonic()) + step_s
        tokens = self._tokens
        sampled = {run.spec.request_id: (tokens[run.end % len(tokens)],) for run in plan.runs if run.samples}
        return NullStep(StepResult(sampled), self._busy_until_s if step_s else 0.0)


@dataclass(frozen=True, slots=True)
class NullStep:
    """A step that is over at ``end_s``."""

    outcome: StepResult
    end_s: float

    def result(self) -> StepResult:
        if self.end_s:
            time.sleep(max(0.0, self.end_s - time.monotonic()))
        return self.outcome


def new_null_executor(
    model: ModelConfigSection,
    engine: EngineConfig,
    *,
    num_threads: int | None,
    shared_kv: bool,
    progress: Callable[[int, int], None] | None,
    end_phase: Callable[[str], None],
    speculation: SpeculationConfig | None,
    turns: CoreTurns,
) -> NullExecutor:
    """``workers.build.ExecutorFactory``: in the place of the one that loads a model."""
    from eagleray.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(model.folder)
    letter_ids = tuple(tokenizer.encode(chr(letter), add_special_tokens=False)[0] for letter in _LETTERS)
    return NullExecutor(engine.block_size_tokens, letter_ids, shared_kv)


def _step_s(spec: RequestSpec) -> float:
    return min((spec.sampling.seed or 0) / 1e6, _MAX_STEP_S)
