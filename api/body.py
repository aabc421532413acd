"""An endpoint that takes one JSON body."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.routing import request_response

Model = TypeVar("Model", bound=BaseModel)


class BodyRoute(APIRoute):
    """Calls ``endpoint(body, request)``. The framework documents the body, but reads it here: its own way, through
    dependencies that these endpoints do not have, takes longer than everything else that is done for a short prompt
    before it is tokenised."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **rest: Any) -> None:
        super().__init__(path, endpoint, **rest)
        self.app = request_response(self.get_route_handler())  # without a stack of what dependencies leave open

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        model, endpoint = self.body_field and self.body_field.field_info.annotation, self.endpoint
        assert isinstance(model, type) and issubclass(model, BaseModel), f"{self.path} takes {model}"

        async def handle(request: Request) -> Response:
            response: Response = await endpoint(await _read_body(request, model), request)
            return response

        return handle


async def _read_body(request: Request, model: type[Model]) -> Model:
    """Raises ``RequestValidationError`` as the framework does, whose shape the error handlers know."""
    try:
        data = await request.body()
        values = json.loads(data) if data else None
    except json.JSONDecodeError as error:
        detail = {"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}}
        raise RequestValidationError([detail]) from None
    except (ClientDisconnect, ValueError, RecursionError):  # not all of it, not UTF-8, or nested too deeply
        raise HTTPException(400, "There was an error parsing the body") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise RequestValidationError([{**detail, "loc": ("body", *detail["loc"])} for detail in found]) from None
