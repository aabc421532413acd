"""``eagleray demo``: a service on this machine, a few questions over HTTP, and where the time of each went."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final, NamedTuple

from rich.console import Console

from eagleray.cli.client import ApiClient
from eagleray.cli.local_service import local_service, print_snippets, wait_for_signal, why_not_free
from eagleray.cli.options import add_port_argument, config_from
from eagleray.cli.terminal import Progress, write_now
from eagleray.cli.timing import timing_table, tokens_per_step, workers_of
from eagleray.core.clock import SystemClock
from eagleray.core.config import DEMO_MODEL, Config, SpeculationConfig
from eagleray.core.errors import ConfigError

TABLE_WIDTH: Final = 140
PORTS_TRIED: Final = 100

# Several KV blocks long: whoever asks second under it finds them computed.
SYSTEM_MESSAGE: Final = (
    "You are a Python programmer. You write small functions for people who ask for them: one function for each "
    "question, with a short docstring that says what it does, and with names that are full words. You use the standard "
    "library only. Answer with code."
)
SPECULATION: Final = SpeculationConfig(method="eagle3", model=DEMO_MODEL)
SAMPLING: Final[dict[str, Any]] = {"max_tokens": 64, "temperature": 0.0}


class Question(NamedTuple):
    """What is asked, and what to look at in the answer's times."""

    heading: str
    text: str
    system: str | None = SYSTEM_MESSAGE

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.text}]


QUESTIONS: Final = (
    Question("A short question is prefilled where it is decoded", "hello", system=None),
    Question("A long system message is prefilled elsewhere", "Write a Python function that reverses a string."),
    Question("The same system message again: reused", "Write a function that checks whether a number is prime."),
    Question("And once more", "Write a Python function that merges two dictionaries."),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="end after the answers")
    add_port_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    config, clock = _config(arguments), SystemClock()
    progress = Progress(clock, sys.stdout)
    try:
        with local_service(config, progress, clock) as address:
            progress(f"ready: {config.model.name} at {address}")
            with ApiClient(address, clock, config.http.api_key) as client:
                _ask_all(client, config.model.name)
            if not arguments.once:
                print_snippets(address, config)
                wait_for_signal()
    except KeyboardInterrupt:
        return 0
    return 0


def _config(arguments: argparse.Namespace) -> Config:
    """Two workers of each kind and an index in Redis, as the defaults have it, and the packaged head that guesses
    ahead; the next port if theirs is taken."""
    config = config_from(arguments).model_copy(update={"speculation": SPECULATION})
    http = config.http
    if vars(arguments)["http.port"] is None and why_not_free(http.host, http.port) is not None:
        ports = range(http.port + 1, http.port + PORTS_TRIED)
        free = next((port for port in ports if why_not_free(http.host, port) is None), None)
        if free is None:
            raise ConfigError("http.port", http.port, "is taken, and so are those after it; give one with --port")
        return config.model_copy(update={"http": http.model_copy(update={"port": free})})
    return config


def _ask_all(client: ApiClient, model: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False)
    for number, question in enumerate(QUESTIONS, start=1):
        console.print(f"\n[bold]{number}. {question.heading}[/bold]")
        print(f"> {question.text}", flush=True)
        answer = client.stream_chat({"model": model, "messages": question.messages, **SAMPLING}, write_now)
        print("\n")
        if answer.account is not None:
            console.print(timing_table(answer, answer.account))
            console.print(f"[dim]{workers_of(answer.account)} ({answer.account.route_reason})[/dim]")
            if answer.account.acceptance is not None:
                console.print(
                    f"[dim]{tokens_per_step(answer.account.acceptance)}: the draft's guesses that came true[/dim]"
                )
    console.print(
        "\n[dim]* with what lies between the server and this client; the parts sum to the client's total[/dim]"
    )
