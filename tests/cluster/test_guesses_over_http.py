"""What a client sees of guesses: nothing. Prefill and decode worker, all guesses of which come true, behind HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from eagleray.api.app import create_app
from eagleray.api.context import ApiSettings
from eagleray.cluster.local import LocalCluster
from eagleray.core.clock import SystemClock
from eagleray.core.config import PoolConfig, parse_config
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import Role
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.engine.speculation.controller import FixedDrafts
from eagleray.engine.speculation.tree import DraftShape
from eagleray.text.fake import byte_tokenizer, chatml_template
from eagleray.text.output import OutputText

TOKENIZER = byte_tokenizer()
PROMPT = [7 * place % 250 for place in range(40)]
NUM_GUESSES = 3
CONFIG = parse_config({"prefill": {"replicas": 1}, "decode": {"replicas": 1}, "router": {"local_prefill_tokens": 8}})


def new_executor(role: Role, pool: PoolConfig) -> FakeExecutor:
    return FakeExecutor(num_blocks=64, max_model_tokens=512, shared=True, guess_rate=1.0)


async def ask(num_guesses: int, **fields: Any) -> dict[str, Any]:
    """The body of the answer, but for what tells one request from another."""
    cluster = LocalCluster(
        CONFIG,
        new_executor,
        lambda spec: OutputText(TOKENIZER, spec.sampling, spec.token_ids),
        new_draft_policy=(lambda executor: FixedDrafts(DraftShape(num_guesses))) if num_guesses else None,
    )
    async with cluster:
        settings = ApiSettings(model="fish", max_body_bytes=50_000, created_s=0)
        app = create_app(cluster.coordinator, TOKENIZER, chatml_template(), settings, SystemClock())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=10) as client:
            body = {"model": "fish", "prompt": PROMPT, "seed": 5, "ignore_eos": True, "max_tokens": 24, **fields}
            response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return {name: answer[name] for name in ("choices", "usage")}


def continuation(count: int) -> list[int]:
    spec = RequestSpec(
        request_id="", token_ids=tuple(PROMPT), num_prompt_tokens=len(PROMPT), sampling=SamplingParams(seed=5)
    )
    return FakeExecutor().continuation(spec, count)


# The prefill worker samples one token, the decode worker's first step one more; then they come four at a time.
@pytest.mark.parametrize("num_tokens", [*range(1, 2 * NUM_GUESSES + 4)])
@pytest.mark.parametrize("end", ["max_tokens", "stop_token_ids"])
async def test_an_answer_that_ends_anywhere_in_a_run_of_guesses_is_the_same_and_counted_the_same(
    end: str, num_tokens: int
) -> None:
    last = continuation(num_tokens)[-1]
    assert last not in continuation(num_tokens - 1)
    fields: dict[str, Any] = {"max_tokens": num_tokens} if end == "max_tokens" else {"stop_token_ids": [last]}
    answer = await ask(NUM_GUESSES, logprobs=1, **fields)
    assert answer == await ask(0, logprobs=1, **fields)
    assert answer["usage"]["completion_tokens"] == num_tokens
    assert answer["choices"][0]["finish_reason"] == ("length" if end == "max_tokens" else "stop")


async def test_several_answers_are_the_same_and_all_their_tokens_are_counted() -> None:
    answer = await ask(NUM_GUESSES, n=3, logprobs=0)
    assert answer == await ask(0, n=3, logprobs=0)
    assert answer["usage"]["completion_tokens"] == 3 * 24
    assert len({choice["text"] for choice in answer["choices"]}) == 3
