"""Entry point of the ``eagleray`` command. Only the module of the subcommand that was asked for is imported."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from eagleray import __version__
from eagleray.core.errors import EagleRayError

COMMANDS: Final[Mapping[str, str]] = {
    "serve": "an OpenAI-compatible endpoint with prefill and decode workers on this machine",
    "chat": "talk to a running server in the terminal",
    "status": "what a running server's workers are doing",
    "generate": "answer prompts in this process, without a server",
    "demo": "start a service, ask it a few questions and show where the time went",
    "train-draft": "train a draft head on a model's own answers, for speculation",
    "doctor": "check this machine: software, hardware, transports, model",
}
EXIT_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 130
EXIT_PIPE_CLOSED: Final = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. What goes wrong on purpose is one sentence on standard error and code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(build_parser(words).parse_args(words))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    try:
        code: int = _module(arguments.command).run(arguments)
        sys.stdout.flush()
    except EagleRayError as error:
        print(f"eagleray {arguments.command}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say, at interpreter exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    return code


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of those commands only that ``words`` name."""
    parser = argparse.ArgumentParser(
        prog="eagleray", description="Serve large language models with prefill and decode on separate workers."
    )
    parser.add_argument("--version", action="version", version=f"eagleray {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(
            name, help=purpose, description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in words:
            _module(name).add_arguments(command)
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f"eagleray.cli.{command.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
