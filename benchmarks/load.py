"""The load: requests sent when they are due, whether or not earlier ones have been answered, and what came back.

An open loop: a server that falls behind meets the load that it would meet in production, instead of a client that
kindly waits. Only ``max_concurrency`` bends this; how late it made the client is part of every outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

import httpx
import msgspec
from workload import ScheduledRequest, Workload

_DATA: Final = "data: "
_DONE: Final = "data: [DONE]"
_STATUS_TIMEOUT_S: Final = 10.0


class ServerError(RuntimeError):
    """The server cannot be benchmarked; the text says why."""


@dataclass(frozen=True)
class ServedModel:
    """What the server says about itself."""

    name: str
    max_model_tokens: int
    workers: tuple[Mapping[str, Any], ...]  # as ``GET /v1/status`` lists them; empty where there is no such page


@dataclass(frozen=True)
class LoadOptions:
    model: str
    max_concurrency: int
    request_timeout_s: float
    total_timeout_s: float  # after it, what is not answered counts as unfinished
    cache_salt: str  # keeps this run's prefixes apart from those of earlier runs


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int = 0


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int:
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else 0


class _Event(msgspec.Struct):
    """One server-sent event; everything else in it is skipped unread."""

    choices: list[msgspec.Raw] = []
    usage: Usage | None = None
    timing: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


@dataclass(frozen=True)
class Answer:
    """A whole answer. Times in seconds since the start of the replay."""

    sent_s: float
    chunk_times_s: Sequence[float]  # arrivals of output, at least one
    end_s: float
    usage: Usage
    timing: Mapping[str, Any] | None  # the server's account of where the time went, where it gives one

    @property
    def latency_s(self) -> float:
        return self.end_s - self.sent_s


@dataclass
class Outcome:
    """What became of one request: an answer or the kind of an error, in the end."""

    request: ScheduledRequest
    sent_s: float | None = None  # None: it never was
    answer: Answer | None = None
    error: str | None = None


class _Failed(Exception):
    """The answer is not what was asked for; the text is the kind of error that counts it."""


async def ask_server(client: httpx.AsyncClient) -> ServedModel:
    """Raises ``ServerError`` when it does not answer or serves nothing, or not yet."""
    try:
        models = await client.get("/v1/models", timeout=_STATUS_TIMEOUT_S)
        models.raise_for_status()
        card = models.json()["data"][0]
        page = await client.get("/v1/status", timeout=_STATUS_TIMEOUT_S)
        status = page.json() if page.is_success else {}
        limit = status.get("max_model_tokens") or card["max_model_len"]
        served = ServedModel(card["id"], limit, tuple(status.get("workers", ())))
    except (httpx.HTTPError, ValueError, LookupError) as error:
        message = f"{client.base_url}: {error or type(error).__name__}; start a server there or give another --url"
        raise ServerError(message) from None
    if limit is None:  # the ingress answers before there is a worker that could say it
        raise ServerError(f"{client.base_url}: no worker serves {served.name} yet; wait until the server is ready")
    return served


async def replay(
    client: httpx.AsyncClient, workload: Workload, options: LoadOptions, on_change: Callable[[Outcome], None]
) -> list[Outcome]:
    """Send everything on schedule; returns one outcome per request, in order. ``on_change`` hears of each sent request
    and of each end."""
    outcomes = [Outcome(request) for request in workload.requests]
    sender = _Sender(client, workload, options, on_change)
    with suppress(TimeoutError):
        async with asyncio.timeout(options.total_timeout_s), asyncio.TaskGroup() as tasks:
            for outcome in outcomes:
                await asyncio.sleep(max(0.0, outcome.request.due_s - sender.now_s()))
                tasks.create_task(sender.send(outcome))
    for outcome in outcomes:
        if outcome.answer is None and outcome.error is None:
            outcome.error = "unfinished"
    return outcomes


class _Sender:
    """Sends single requests."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        workload: Workload,
        options: LoadOptions,
        on_change: Callable[[Outcome], None],
    ) -> None:
        self._client, self._workload, self._options, self._on_change = client, workload, options, on_change
        self._room = asyncio.Semaphore(options.max_concurrency)
        self._start_s = perf_counter()

    def now_s(self) -> float:
        return perf_counter() - self._start_s

    async def send(self, outcome: Outcome) -> None:
        """Fill ``outcome``; what goes wrong is an error in it."""
        async with self._room:
            body = self._body(outcome.request)
            outcome.sent_s = self.now_s()
            self._on_change(outcome)
            try:
                async with asyncio.timeout(self._options.request_timeout_s):
                    outcome.answer = await self._answer(outcome.request, body, outcome.sent_s)
            except TimeoutError:
                outcome.error = "timeout"
            except httpx.HTTPError as error:
                outcome.error = type(error).__name__
            except msgspec.MsgspecError:
                outcome.error = "unreadable event"
            except _Failed as error:
                outcome.error = str(error)
            self._on_change(outcome)

    async def _answer(self, request: ScheduledRequest, body: bytes, sent_s: float) -> Answer:
        """Raises ``_Failed`` unless all of it arrived and has the lengths that were asked for."""
        chunk_times_s, usage, timing = [], None, None
        async with aclosing(self._events(body)) as events:
            async for event in events:
                if event.error is not None:
                    raise _Failed(f"in the stream: {_kind(event.error)}")
                if event.choices:
                    chunk_times_s.append(self.now_s())
                usage, timing = event.usage or usage, event.timing or timing
        if usage is None or not chunk_times_s:
            raise _Failed("no output or no usage")
        if usage.prompt_tokens != request.num_prompt_tokens:
            raise _Failed("wrong number of prompt tokens")
        if usage.completion_tokens != request.num_output_tokens:
            raise _Failed("wrong number of output tokens")
        return Answer(sent_s, chunk_times_s, self.now_s(), usage, timing)

    async def _events(self, body: bytes) -> AsyncGenerator[_Event, None]:
        headers = {"Content-Type": "application/json"}
        async with self._client.stream("POST", "/v1/completions", content=body, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                raise _Failed(_refusal(response.status_code, await response.aread()))
            async for line in response.aiter_lines():
                if line == _DONE:
                    return
                if line.startswith(_DATA):
                    yield _decode_event(line.removeprefix(_DATA))
        raise _Failed("incomplete stream")

    def _body(self, request: ScheduledRequest) -> bytes:
        return msgspec.json.encode(
            {
                "model": self._options.model,
                "prompt": self._workload.token_ids(request),
                "max_tokens": request.num_output_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_timing": True,
                "cache_salt": self._options.cache_salt,
            }
        )


def _refusal(status: int, body: bytes) -> str:
    try:
        return f"HTTP {status} {_kind(msgspec.json.decode(body)['error'])}"
    except (msgspec.MsgspecError, LookupError, TypeError):
        return f"HTTP {status}"


def _kind(error: Mapping[str, Any]) -> str:
    return str(error.get("code") or error.get("type") or "error")
