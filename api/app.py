"""The HTTP front: an application over a ``GenerationService``."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fastapi import FastAPI, Request, Response

from eagleray.api.body import BodyRoute
from eagleray.api.chat import ChatFormat, prepare_chat
from eagleray.api.completions import CompletionFormat, prepare_completion
from eagleray.api.context import ApiContext, ApiSettings
from eagleray.api.errors import add_error_handlers
from eagleray.api.health import health_routes
from eagleray.api.limits import INLINE_BODY_BYTES
from eagleray.api.middleware import ARRIVED_S, FrontDoor
from eagleray.api.openai_types import ChatCompletionRequest, CompletionRequest, GenerationRequest
from eagleray.api.prepared import PreparedRequest
from eagleray.api.response_types import ChatCompletion, Completion, ErrorBody
from eagleray.api.stream import respond
from eagleray.core.clock import Clock
from eagleray.router.service import GenerationService
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

Body = TypeVar("Body", bound=GenerationRequest)
Prepare = Callable[[Body, ApiContext, str | None], PreparedRequest]
# 422 is never sent, but the framework documents its own shape for it where we give none.
_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 413, 415, 422, 429, 500, 503)
}


def create_app(
    service: GenerationService, tokenizer: Tokenizer, template: ChatTemplate, settings: ApiSettings, clock: Clock
) -> FastAPI:
    """The ASGI application."""
    context = ApiContext(service, tokenizer, template, settings, clock)
    # Spans and metrics are the router's; the framework's own would look for them in every request.
    own_telemetry: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(title="eagleray", docs_url=None, redoc_url=None, telemetry=own_telemetry)
    app.router.route_class = BodyRoute
    app.add_middleware(FrontDoor, max_body_bytes=settings.max_body_bytes, api_key=settings.api_key, clock=clock)
    add_error_handlers(app)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ERRORS)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        prepared = await _prepared(prepare_chat, body, request, context)
        return await respond(request, prepared, service, ChatFormat(prepared, context))

    @app.post("/v1/completions", response_model=Completion, responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        prepared = await _prepared(prepare_completion, body, request, context)
        return await respond(request, prepared, service, CompletionFormat(prepared, context))

    app.include_router(health_routes(context))  # last: routes are tried in order
    return app


async def _prepared(prepare: Prepare[Body], body: Body, request: Request, context: ApiContext) -> PreparedRequest:
    """``prepare``, off the event loop when the body is large or of unknown size."""
    trace_parent = request.headers.get("traceparent")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) <= INLINE_BODY_BYTES:
        prepared = prepare(body, context, trace_parent)
    else:
        prepared = await asyncio.to_thread(prepare, body, context, trace_parent)
    return dataclasses.replace(prepared, already_s=context.clock.now_s() - request.scope[ARRIVED_S])
