"""``eagleray chat``: a conversation with a running server."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from eagleray.cli.client import ApiClient, add_client_arguments, client_from
from eagleray.cli.options import add_sampling_arguments, given
from eagleray.cli.terminal import dim, write_now
from eagleray.cli.timing import timing_line
from eagleray.core.clock import SystemClock
from eagleray.core.errors import EagleRayError

PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="ask this and leave; without it, a conversation")
    add_client_arguments(parser)
    parser.add_argument("--model", metavar="NAME", help="name of the model; default: the one that is served")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    with client_from(arguments, SystemClock()) as client:
        conversation = Conversation(client, arguments.model or client.model(), given(arguments, "sampling"))
        if arguments.system is not None:
            conversation.messages.append({"role": "system", "content": arguments.system})
        if arguments.prompt is not None:
            conversation.ask(arguments.prompt)
        else:
            _converse(conversation)
    return 0


class Conversation:
    """The messages so far, and the next question."""

    def __init__(self, client: ApiClient, model: str, sampling: dict[str, Any]) -> None:
        self.messages: list[dict[str, str]] = []
        self._client, self._model, self._sampling = client, model, sampling

    def ask(self, text: str) -> None:
        """Print the answer as it arrives. What has arrived becomes part of the conversation, however it ends."""
        self.messages.append({"role": "user", "content": text})
        arrived: list[str] = []

        def take(piece: str) -> None:
            arrived.append(piece)
            write_now(piece)

        body = {"model": self._model, "messages": self.messages, **self._sampling}
        try:
            answer = self._client.stream_chat(body, take)
        finally:
            self._note_answer("".join(arrived))
        print(dim(timing_line(answer), sys.stderr), file=sys.stderr)

    def _note_answer(self, text: str) -> None:
        if text:
            print(flush=True)
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()  # nothing came: the question does not count


def _converse(conversation: Conversation) -> None:
    """Ask what is typed until Ctrl-D. Ctrl-C hangs up on an answer, or drops the line that is being typed."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  its import makes input() editable, with a history
    if sys.stdin.isatty():
        print(dim("Ctrl-C stops an answer, Ctrl-D leaves.", sys.stderr), file=sys.stderr)
    while True:
        try:
            line = input(PROMPT if sys.stdin.isatty() else "").strip()
            if line:
                conversation.ask(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            print(dim("(stopped)", sys.stderr), file=sys.stderr)
        except EagleRayError as error:
            print(f"eagleray chat: {error}", file=sys.stderr)
