from __future__ import annotations

import json

import httpx
import msgspec
import pytest

from eagleray.api.app import create_app
from eagleray.api.context import ApiSettings
from eagleray.core.acceptance import Acceptance
from eagleray.core.clock import SystemClock
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.router.fake_service import FakeGenerationService
from eagleray.router.service import ServiceStatus
from eagleray.text.fake import chatml_template


async def test_health_says_that_the_process_lives(client):
    assert (await client.get("/health")).status_code == 200


async def test_readiness_tells_the_reason_when_nothing_can_be_served(client, tokenizer):
    assert (await client.get("/ready")).json() == {"ready": True, "reason": ""}
    service = FakeGenerationService(tokenizer, ready=False)
    app = create_app(service, tokenizer, chatml_template(), ApiSettings("m", 1000, 0), SystemClock())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as unready:
        answer = await unready.get("/ready")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no decode worker")


async def test_the_model_list_has_the_model_and_its_card(client):
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    card = (await client.get("/v1/models/fish")).json()
    assert models["data"] == [card]
    assert (card["id"], card["object"], card["created"], card["max_model_len"]) == ("fish", "model", 1_700_000_000, 256)


async def test_an_unknown_model_is_404_and_named_with_the_one_there_is(client, ask):
    for answer in (await client.get("/v1/models/bird"), await ask.chat(model="bird"), await ask.complete(model="bird")):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "'bird'" in error["message"] and "'fish'" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nope", 404), ("GET", "/", 404), ("GET", "/v1/completions", 405)]
)
async def test_unknown_routes_and_wrong_methods_are_json_errors(client, method: str, path: str, status: int):
    answer = await client.request(method, path)
    assert answer.status_code == status
    assert path in answer.json()["error"]["message"]


async def test_metrics_are_the_services_and_move(client, ask):
    async def count() -> str:
        page = await client.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain")
        return page.text.splitlines()[-1]

    before = await count()
    await ask.complete(max_tokens=3)
    assert (before, await count()) == ("eagleray_output_tokens_total 0", "eagleray_output_tokens_total 3")


async def test_the_status_page_has_the_whole_service_status(client):
    status = (await client.get("/v1/status")).json()
    assert status["ready"] is True and status["max_model_tokens"] == 256 and status["workers"] == []


async def test_the_status_page_tells_how_far_each_workers_guesses_come_true(client, service, monkeypatch):
    guessing = Acceptance(
        num_steps=4, num_draft_tokens=4, num_accepted_tokens=3, drafts_per_position=(2, 2), accepted_per_position=(2, 1)
    )
    workers = (
        WorkerSnapshot(worker_id="d", role=Role.DECODE, epoch=1, acceptance=guessing),
        WorkerSnapshot(worker_id="p", role=Role.PREFILL, epoch=1),
    )
    status = msgspec.structs.replace(service.status(), workers=workers)
    monkeypatch.setattr(service, "status", lambda: status)
    page = await client.get("/v1/status")
    decode, prefill = page.json()["workers"]
    assert (decode["acceptance"]["acceptance_length"], decode["acceptance"]["rate_per_position"]) == (2.5, [1.0, 0.5])
    assert (prefill["worker_id"], prefill["role"], prefill["acceptance"]) == ("p", "prefill", None)
    assert msgspec.json.decode(page.content, type=ServiceStatus) == status  # for programs, the counts are all there is


async def test_the_callers_request_id_is_returned_on_answers_and_errors(client, ask):
    for path in ("/health", "/v1/nope"):
        assert (await client.get(path, headers={"x-request-id": "mine-1"})).headers["x-request-id"] == "mine-1"
    ids = {(await ask.complete()).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2


async def test_a_request_id_that_no_header_should_carry_is_replaced(client):
    answer = await client.get("/health", headers={"x-request-id": "a" * 300})
    assert 0 < len(answer.headers["x-request-id"]) < 100


async def test_a_wrong_or_missing_key_is_401_where_a_key_is_asked_for(service, tokenizer):
    app = create_app(service, tokenizer, chatml_template(), ApiSettings("m", 1000, 0, api_key="s3cret"), SystemClock())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for authorization, status in (("", 401), ("Bearer no", 401), ("Basic s3cret", 401), ("Bearer s3cret", 200)):
            answer = await client.get("/v1/models", headers={"authorization": authorization})
            assert answer.status_code == status
        assert (await client.get("/health")).status_code == 200


async def test_the_openapi_document_describes_requests_and_responses(client):
    document = (await client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    assert "ChatCompletionRequest" in json.dumps(operation["requestBody"])
    assert "ChatCompletion" in json.dumps(operation["responses"]["200"])
