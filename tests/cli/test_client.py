"""Reading a server's answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from eagleray.cli.client import ApiClient, read_events
from eagleray.core.clock import SystemClock
from eagleray.core.errors import EagleRayError, Overloaded

STREAM = 'data: {"a": "x\u2028y"}\n\n: comment\n\ndata: {"b": 2}\r\n\r\ndata: [DONE]\n\n'.encode()


@pytest.mark.parametrize("chunk_bytes", [1, 2, 7, 1000])
def test_events_do_not_depend_on_how_the_bytes_arrive(chunk_bytes: int) -> None:
    chunks = [STREAM[start : start + chunk_bytes] for start in range(0, len(STREAM), chunk_bytes)]
    assert list(read_events(chunks)) == [{"a": "x\u2028y"}, {"b": 2}]


def test_a_stream_that_breaks_off_is_an_error() -> None:
    with pytest.raises(EagleRayError, match="ended early"):
        list(read_events([b'data: {"a": 1}\n\n']))


def test_an_error_in_the_stream_is_raised_in_the_servers_words() -> None:
    with pytest.raises(EagleRayError, match="it broke"):
        list(read_events([b'data: {"error": {"message": "it broke"}}\n\n']))


@pytest.fixture
def client(server: Any) -> Iterator[ApiClient]:
    with ApiClient(server.url + "/v1/", SystemClock()) as client:
        yield client


def body(text: str = "hi") -> dict[str, object]:
    return {"model": "fish", "messages": [{"role": "user", "content": text}]}


def test_an_answer_arrives_in_pieces_with_its_times(client: ApiClient, server: Any) -> None:
    server.service.script.answer = "Grüße\u2028!"
    pieces: list[str] = []
    answer = client.stream_chat(body(), pieces.append)
    assert "".join(pieces) == answer.text == "Grüße\u2028!"
    assert len(pieces) > 1
    assert answer.account is not None and answer.account.decode_worker == "decode-0"
    assert answer.time_to_first_token_s is not None
    assert 0 < answer.time_to_first_token_s <= answer.total_s


def test_leaving_early_ends_the_request_at_the_server(client: ApiClient, server: Any) -> None:
    server.service.script.answer = "a long answer"
    server.service.script.pause_after_tokens = 3

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.stream_chat(body(), interrupt)
    server.wait_all_closed()
    assert server.service.open_generations == 0


def test_a_refusal_is_raised_in_the_servers_words(client: ApiClient, server: Any) -> None:
    server.service.script.refuse_with = Overloaded("no room for now", 3.0)
    with pytest.raises(EagleRayError, match="no room for now"):
        client.stream_chat(body(), lambda text: None)


def test_model_and_status_are_the_servers(client: ApiClient) -> None:
    assert client.model() == "fish"
    assert client.status().ready


def test_a_key_is_sent_where_one_is_asked_for(locked_server: Any) -> None:
    with ApiClient(locked_server.url, SystemClock(), "only-for-friends") as client:
        assert client.model() == "fish"
        assert client.stream_chat(body(), lambda text: None).text


@pytest.mark.parametrize("key", [None, "", "not-this-one"])
def test_a_wrong_or_missing_key_is_an_error_that_says_where_it_belongs(locked_server: Any, key: str | None) -> None:
    with (
        ApiClient(locked_server.url, SystemClock(), key) as client,
        pytest.raises(EagleRayError, match="set EAGLERAY_API_KEY or --api-key"),
    ):
        client.status()


@pytest.mark.parametrize("key", ["two words", "a-line\n", "schlüssel"])
def test_a_key_that_no_header_carries_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(EagleRayError, match="no header carries") as error:
        ApiClient("http://127.0.0.1:1", SystemClock(), key)
    assert key not in str(error.value)


def test_another_kind_of_server_is_named_as_such() -> None:
    front = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # knows no method at all
    threading.Thread(target=front.serve_forever, daemon=True).start()
    with (
        ApiClient(f"http://127.0.0.1:{front.server_port}", SystemClock()) as client,
        pytest.raises(EagleRayError, match="answers with status 501: is it an eagleray"),
    ):
        client.status()
    front.shutdown()
    front.server_close()
