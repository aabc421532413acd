"""A running server as seen by the commands that talk to it: status, and chat answers as they arrive."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httpx
import msgspec

from eagleray.core.clock import Clock
from eagleray.core.config import HTTPConfig, read_environment
from eagleray.core.errors import EagleRayError
from eagleray.core.telemetry import TimeAccount
from eagleray.router.service import ServiceStatus

CONNECT_DEADLINE_S: Final = 5.0
SILENCE_DEADLINE_S: Final = 300.0
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


class ServerUnreachable(EagleRayError):
    """Nothing answers at the address."""


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """One whole answer, with times as the client measured them."""

    text: str
    total_s: float
    time_to_first_token_s: float | None  # None: it has no text
    account: TimeAccount | None  # the server's own


def default_url() -> str:
    """Where ``eagleray serve`` listens unless it is told otherwise."""
    http = HTTPConfig()
    return f"http://{http.host}:{http.port}"


def add_client_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=default_url(), help="address of the server (%(default)s)")
    parser.add_argument(
        "--api-key", metavar="KEY", help="if the server asks for one; better in EAGLERAY_API_KEY, which no list shows"
    )


def client_from(arguments: argparse.Namespace, clock: Clock) -> ApiClient:
    """For the server that the options of ``add_client_arguments`` name."""
    return ApiClient(arguments.url, clock, arguments.api_key or read_environment().api_key)


class ApiClient:
    """One server, from construction to ``close``. ``url`` may end with ``/v1``; ``api_key`` is sent if there is one.

    All methods raise ``ServerUnreachable`` when nobody answers, and ``EagleRayError`` with the server's own words when
    it refuses.
    """

    def __init__(self, url: str, clock: Clock, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._clock = clock
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EagleRayError(f"--url={url!r}: write it as http://host:port")
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise EagleRayError(
                "the API key has a space or another character that no header carries; see EAGLERAY_API_KEY"
            )
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(SILENCE_DEADLINE_S, connect=CONNECT_DEADLINE_S)
        # A proxy of the environment does not lead to this machine.
        trust_env = parts.hostname not in _LOOPBACK
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=trust_env)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def status(self) -> ServiceStatus:
        return self._status_of(self._get("/v1/status"))

    def status_report(self) -> bytes:
        """As the server sends it, in JSON."""
        content = self._get("/v1/status")
        self._status_of(content)
        return content

    def _status_of(self, content: bytes) -> ServiceStatus:
        try:
            return msgspec.json.decode(content, type=ServiceStatus)
        except msgspec.DecodeError as error:
            raise EagleRayError(f"{self.url}/v1/status is not an eagleray server's: {error}") from None

    def model(self) -> str:
        """The name of the model that is served."""
        try:
            return str(json.loads(self._get("/v1/models"))["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise EagleRayError(f"{self.url}/v1/models names no model; name it with --model") from None

    def stream_chat(self, body: Mapping[str, Any], on_text: Callable[[str], None]) -> ChatAnswer:
        """Ask, and hand on text as it arrives. Leaving by an exception hangs up, which ends the request there."""
        start_s, first_s = self._clock.now_s(), None
        texts: list[str] = []
        account = None
        request = {**body, "stream": True, "return_timing": True}
        with self._explained(), self._http.stream("POST", "/v1/chat/completions", json=request) as response:
            _require_success(response)
            for event in read_events(response.iter_bytes()):
                if text := _text_of(event):
                    first_s = first_s or self._clock.now_s()
                    texts.append(text)
                    on_text(text)
                if event.get("timing"):
                    account = msgspec.convert(event["timing"], TimeAccount)
        first_token_s = None if first_s is None else first_s - start_s
        return ChatAnswer("".join(texts), self._clock.now_s() - start_s, first_token_s, account)

    def _get(self, path: str) -> bytes:
        with self._explained():
            response = self._http.get(path)
            _require_success(response)
            return response.content

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise ServerUnreachable(
                f"no server answers at {self.url}; start one with `eagleray serve`, or give its address with --url"
            ) from None
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise EagleRayError(f"{self.url}: the connection broke: {reason}") from None


def read_events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of server-sent events, until ``[DONE]``.

    Lines end at a newline byte and nowhere else: text may hold other separators that Unicode counts as line ends.
    Raises ``EagleRayError`` when the stream ends before ``[DONE]``.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            field, _, value = line.partition(b":")
            if field != b"data":
                continue
            if value.strip() == b"[DONE]":
                return
            event: dict[str, Any] = json.loads(value)
            if "error" in event:
                raise EagleRayError(_message_of(event) or "the server reports an error without a message")
            yield event
    raise EagleRayError("the answer ended early: the server closed the connection; ask again")


def _text_of(event: Mapping[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _require_success(response: httpx.Response) -> None:
    if response.is_success:
        return
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise EagleRayError(f"{response.url} refuses the API key or the lack of one: set EAGLERAY_API_KEY or --api-key")
    try:
        message = _message_of(json.loads(response.read()))
    except ValueError:
        message = None
    raise EagleRayError(
        message or f"{response.url} answers with status {response.status_code}: is it an eagleray server?"
    )


def _message_of(body: Any) -> str | None:
    error = body.get("error") if isinstance(body, dict) else None
    return error.get("message") if isinstance(error, dict) else None
