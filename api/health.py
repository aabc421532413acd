"""What tells clients and operators about the server: models, health, readiness, metrics, status."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Response

from eagleray.api.context import ApiContext
from eagleray.api.report import status_report
from eagleray.api.response_types import ModelCard, ModelList


def health_routes(context: ApiContext) -> APIRouter:
    """The routes that answer without generating anything."""
    router = APIRouter()
    service, settings = context.service, context.settings

    def card() -> ModelCard:
        return {
            "id": settings.model,
            "object": "model",
            "created": settings.created_s,
            "owned_by": "eagleray",
            "max_model_len": service.status().max_model_tokens,
        }

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        return {"object": "list", "data": [card()]}

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> ModelCard:
        context.check_model(model)
        return card()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive; whether it can serve is ``/ready``."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> Response:
        """200 when requests can be served, else 503 with the reason."""
        status = service.status()
        body = {"ready": status.ready, "reason": status.reason}
        return Response(msgspec.json.encode(body), 200 if status.ready else 503, media_type="application/json")

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/status")
    async def status() -> Response:
        """The whole ``ServiceStatus``."""
        return Response(msgspec.json.encode(status_report(service.status())), media_type="application/json")

    return router
