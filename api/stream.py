"""Server-sent events, and the way from a prepared request to a response, streamed or whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final, Protocol

import msgspec
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from eagleray.api.answer import Answer, Choice
from eagleray.api.errors import describe
from eagleray.api.hang_up import HungUp, unless_hung_up
from eagleray.api.prepared import PreparedRequest
from eagleray.core.messages import TokenOutput
from eagleray.router.service import GenerationService

_DONE: Final = b"data: [DONE]\n\n"
_CLIENT_CLOSED_REQUEST: Final = 499  # in logs only: nobody reads it


class AnswerFormat(Protocol):
    """The shapes of one endpoint."""

    chunk_object: str

    def opening(self, choice: Choice) -> Mapping[str, Any] | None:
        """The entry of ``choices`` that begins a streamed choice, if there is one."""
        ...

    def delta(self, choice: Choice, output: TokenOutput) -> Mapping[str, Any] | None:
        """The entry of ``choices`` for one output; None when it shows nothing new."""
        ...

    def whole(self, answer: Answer) -> Mapping[str, Any]:
        """The response body."""
        ...


async def respond(
    request: Request, prepared: PreparedRequest, service: GenerationService, form: AnswerFormat
) -> Response:
    """Generate and answer. The first output is awaited before a stream starts, so what is refused is refused with
    its HTTP status. When the client hangs up, the generation is closed at once."""
    answer = Answer(service, prepared)
    if prepared.options.stream:
        return await _streamed(request, answer, form)
    try:
        await unless_hung_up(request.receive, answer.finished())
        body = {**form.whole(answer), "usage": answer.usage()}
        if prepared.options.return_timing:
            body["timing"] = answer.timing()
        return Response(msgspec.json.encode(body), media_type="application/json")
    except HungUp:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        await answer.aclose()


async def _streamed(request: Request, answer: Answer, form: AnswerFormat) -> Response:
    events = _events(answer, form)
    try:
        first = await unless_hung_up(request.receive, anext(events))
    except BaseException as error:
        await answer.aclose()
        if isinstance(error, HungUp):
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        raise
    return EventStreamResponse(first, events, answer)


class EventStreamResponse(Response):
    """Sends events as they come. Unlike Starlette's own, it closes the answer under no cancellation scope."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], answer: Answer) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events, self._answer = first, events, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            # A task of its own: each token would else be passed through the frames of all that has called us.
            await unless_hung_up(receive, asyncio.create_task(self._send_others(send)))
        except HungUp:
            pass
        finally:
            await self._events.aclose()
            await self._answer.aclose()

    async def _send_others(self, send: Send) -> None:
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(answer: Answer, form: AnswerFormat) -> AsyncGenerator[bytes, None]:
    """All events. Raises only before the first; a later error is the last event."""
    chunks = _ChunkWriter(answer, form)
    updates = answer.updates()
    choice, output = await anext(updates)
    openings = [entry for other in answer.choices if (entry := form.opening(other)) is not None]
    yield b"".join(map(chunks.write, openings)) + chunks.write(form.delta(choice, output))
    try:
        async for choice, output in updates:
            if event := chunks.write(form.delta(choice, output)):
                yield event
    except Exception as error:  # the status line is gone: tell it in the stream
        _, body, _ = describe(error)
        yield b"data: " + msgspec.json.encode(body) + b"\n\n"
        return
    yield chunks.ending() + _DONE


class _ChunkWriter:
    """Chunks with everything that does not change encoded once."""

    def __init__(self, answer: Answer, form: AnswerFormat) -> None:
        request = answer.request
        self._answer, self._options = answer, request.options
        head = {
            "id": request.response_id,
            "object": form.chunk_object,
            "created": request.created_s,
            "model": request.model,
        }
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self._options.include_usage else b"]}\n\n"

    def write(self, entry: Mapping[str, Any] | None) -> bytes:
        """The event of one entry of ``choices``; empty for none."""
        if entry is None:
            return b""
        tail = self._tail
        if self._options.continuous_usage:
            tail = b'],"usage":' + msgspec.json.encode(self._answer.usage()) + b"}\n\n"
        return self._head + msgspec.json.encode(entry) + tail

    def ending(self) -> bytes:
        """The chunk without choices that carries usage and timing, as far as they were asked for."""
        extra: dict[str, Any] = {}
        if self._options.include_usage:
            extra["usage"] = self._answer.usage()
        if self._options.return_timing:
            extra["timing"] = self._answer.timing()
        return self._head + b"]," + msgspec.json.encode(extra)[1:] + b"\n\n" if extra else b""
