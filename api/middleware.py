"""What happens to every HTTP request before any endpoint sees it: its time of arrival, its id, its key, its size."""

from __future__ import annotations

import hmac
import re
import uuid
from typing import Final

from fastapi import HTTPException, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eagleray.api.errors import error_body, error_response
from eagleray.core.clock import Clock

REQUEST_ID_HEADER: Final = "x-request-id"
ARRIVED_S: Final = "eagleray.arrived_s"  # key of the ASGI scope: on the front's clock
_REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,256}")


class FrontDoor:
    """Pure ASGI, so that a client's hang-up reaches the endpoint."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, api_key: str | None, clock: Clock) -> None:
        self._app, self._max_body_bytes, self._api_key, self._clock = app, max_body_bytes, api_key, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[ARRIVED_S] = self._clock.now_s()
        headers = Headers(scope=scope)
        asked_id = headers.get(REQUEST_ID_HEADER, "")
        request_id = asked_id if _REQUEST_ID.fullmatch(asked_id) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send_with_id)
        else:
            await self._app(scope, self._bounded(headers, receive), send_with_id)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        if not scope["path"].startswith("/v1/"):
            return None
        if self._api_key is not None and not _is_key(headers.get("authorization", ""), self._api_key):
            message = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            return error_response(401, error_body(message, "authentication_error", code="invalid_api_key"))
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and content_type != "application/json":
            message = f"Content-Type {content_type!r} is not supported; send JSON as 'application/json'."
            return error_response(415, error_body(message, "invalid_request_error"))
        return None

    def _bounded(self, headers: Headers, receive: Receive) -> Receive:
        """``receive`` that stops at the limit: before the first byte if the length is declared, else while reading."""
        declared = headers.get("content-length", "")
        num_bytes = 0
        too_large = HTTPException(413, f"The body is larger than {self._max_body_bytes} bytes.")

        async def bounded() -> Message:
            nonlocal num_bytes
            if declared.isdigit() and int(declared) > self._max_body_bytes:
                raise too_large
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise too_large
            return message

        return bounded


def _is_key(authorization: str, api_key: str) -> bool:
    scheme, _, given = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), api_key.encode())
