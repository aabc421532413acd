"""Errors as OpenAI shapes them, from wherever they come."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from eagleray.api.response_types import ErrorBody
from eagleray.core.errors import EagleRayError, InvalidRequest, Overloaded, ServiceUnavailable

_logger = logging.getLogger(__name__)
_UNAVAILABLE_RETRY_S: Final = 1


class GenerationFailed(EagleRayError):
    """The answer is not whole; the text is for the user (HTTP 500)."""


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> ErrorBody:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, body: ErrorBody, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def describe(error: Exception) -> tuple[int, ErrorBody, dict[str, str]]:
    """``(HTTP status, body, headers)``. What we did not raise on purpose tells a user nothing of our insides."""
    match error:
        case InvalidRequest():
            return error.status, error_body(error.message, _kind(error.status), error.param, error.code), {}
        case Overloaded():
            retry_after = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return 429, error_body(error.message, "rate_limit_error", code="overloaded"), retry_after
        case ServiceUnavailable():
            retry_after = {"Retry-After": str(_UNAVAILABLE_RETRY_S)}
            return 503, error_body(str(error), "server_error", code="service_unavailable"), retry_after
        case GenerationFailed():
            return 500, error_body(str(error), "server_error", code="generation_failed"), {}
        case _:
            _logger.error("a request failed", exc_info=error)
            return 500, error_body("Internal error; the server's log has the details.", "server_error"), {}


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of ``app`` OpenAI's shape, those of the framework too."""

    @app.exception_handler(EagleRayError)
    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(*describe(error))

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        return error_response(*describe(first_problem(error.errors())))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"Unknown route: {request.method} {request.url.path}.",
            405: f"{request.url.path} does not take {request.method}.",
        }.get(error.status_code, str(error.detail))
        body = error_body(message, _kind(error.status_code))
        return error_response(error.status_code, body, dict(error.headers or {}))


def first_problem(errors: Sequence[Any]) -> InvalidRequest:
    """The first of pydantic's findings, as the error that a user reads."""
    first = errors[0]
    param = _field_path(first["loc"][1:])  # the first part is "body"
    match first["type"]:
        case "json_invalid":
            return InvalidRequest(f"The body is not valid JSON: {first['ctx']['error']}.")
        case "extra_forbidden":
            return InvalidRequest(f"Unknown parameter: {param}.", param=param, code="unknown_parameter")
        case "missing" if param:
            return InvalidRequest(f"{param}: is required.", param=param, code="missing_required_parameter")
        case _ if not param:
            return InvalidRequest("The body must be a JSON object.")
        case _:
            return InvalidRequest(f"{param}: {first['msg']}.", param=param, code="invalid_value")


def _field_path(parts: Sequence[str | int]) -> str:
    """``("messages", 0, "role")`` -> ``messages[0].role``; a parser's offset alone names no field."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return "" if path.startswith("[") else path.removeprefix(".")


def _kind(status: int) -> str:
    if status == 401:
        return "authentication_error"
    return "invalid_request_error" if status < 500 else "server_error"
