from __future__ import annotations

from collections.abc import Callable

import pytest

from eagleray.core.block_hash import HashNamespace
from eagleray.core.config import EngineConfig
from eagleray.core.request import Request, RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.scheduling.kv_manager import KVManager
from eagleray.engine.scheduling.plan import StepPlan
from eagleray.engine.scheduling.scheduler import Scheduler
from eagleray.engine.speculation.controller import DraftPolicy
from eagleray.engine.speculation.tree import DraftTree


class Bench:
    """A scheduler whose steps each sample token 7 and guess ``draft`` for whoever may be guessed for."""

    def __init__(
        self,
        policy: DraftPolicy,
        draft: DraftTree | None = None,
        block_size_tokens: int = 16,
        num_blocks: int = 4096,
        max_model_tokens: int | None = None,
        **settings: int,
    ) -> None:
        config = EngineConfig(
            **{"block_size_tokens": block_size_tokens, "max_num_seqs": 32, "watermark": 0.0, **settings}
        )
        self.kv = KVManager(num_blocks, block_size_tokens, HashNamespace("model", block_size_tokens, "layout").root)
        self.scheduler, self.draft = Scheduler(config, self.kv, policy, max_model_tokens), draft

    def add(
        self, request_id: str, num_tokens: int, max_tokens: int | None = 500, output_limit: int | None = None
    ) -> Request:
        spec = RequestSpec(
            request_id=request_id,
            token_ids=tuple(num_tokens + place for place in range(num_tokens)),
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        )
        self.scheduler.add(request := Request(spec, 0.0, output_limit))
        return request

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        for run, request in self.scheduler.runs_that_count(plan):
            if run.samples:
                request.token_ids.append(7)
            self.scheduler.note_computed(run, request, 0, self.draft if run.may_draft else None)
        return plan

    def num_findable(self) -> int:
        """Blocks since the last call."""
        return len(self.kv.cache.drain_changes()[0])


@pytest.fixture
def new_bench() -> Callable[..., Bench]:
    return Bench
