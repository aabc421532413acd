"""The proxy before a split vLLM: a request goes to the prefill instance for its KV, then to the decode instance.

The prefill instance answers one token, which is thrown away, with the ``kv_transfer_params`` that say where its KV
lies; with them in the request the decode instance fetches it (vLLM, "NixlConnector Usage Guide").
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

_COMPLETIONS: Final = "/v1/completions"
_KEEP_KV: Final = {"do_remote_decode": True, "do_remote_prefill": False}


def create_proxy(prefill: httpx.AsyncClient, decode: httpx.AsyncClient) -> Starlette:
    """Serves ``/v1/models`` and ``/v1/completions``; each client has the address of its instance as its base."""

    async def models(_: Request) -> Response:
        return _passed_on(await decode.get("/v1/models"))

    async def completions(request: Request) -> Response:
        body = await request.json()
        prefilled = await prefill.post(_COMPLETIONS, json=prefill_body(body))
        if not prefilled.is_success:
            return _passed_on(prefilled)
        asked = decode.build_request("POST", _COMPLETIONS, json=decode_body(body, prefilled.json()))
        answer = await decode.send(asked, stream=True)
        return StreamingResponse(
            _chunks(answer),
            answer.status_code,
            media_type=_media_type(answer),
            background=BackgroundTask(answer.aclose),
        )

    return Starlette(routes=[Route("/v1/models", models), Route(_COMPLETIONS, completions, methods=["POST"])])


def prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    """The same prompt for one token, whole and not in pieces, with its KV kept until it was fetched."""
    kept = {name: value for name, value in body.items() if name != "stream_options"}
    return {**kept, "stream": False, "max_tokens": 1, "kv_transfer_params": _KEEP_KV}


def decode_body(body: dict[str, Any], prefilled: dict[str, Any]) -> dict[str, Any]:
    """The request with the place of its KV. Raises ``KeyError`` when the prefill instance named none."""
    return {**body, "kv_transfer_params": prefilled["kv_transfer_params"]}


async def _chunks(answer: httpx.Response) -> AsyncIterator[bytes]:
    """As they come. An answer that breaks off ends as an event that says so, not as if it were whole."""
    try:
        async for chunk in answer.aiter_bytes():
            yield chunk
    except httpx.HTTPError as error:
        yield f"data: {json.dumps({'error': {'type': type(error).__name__, 'message': str(error)}})}\n\n".encode()


def _passed_on(answer: httpx.Response) -> Response:
    return Response(answer.content, answer.status_code, media_type=_media_type(answer))


def _media_type(answer: httpx.Response) -> str | None:
    return answer.headers.get("content-type")
