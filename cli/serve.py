"""``eagleray serve``: an OpenAI-compatible endpoint until it is stopped."""

from __future__ import annotations

import argparse
import sys

from eagleray.cli.local_service import local_service, print_snippets, wait_for_signal
from eagleray.cli.options import add_config_arguments, config_from, describe_keys
from eagleray.cli.terminal import Progress
from eagleray.core.clock import SystemClock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        help="show the log, Ray's included; without it only what matters is shown",
    )
    parser.epilog = describe_keys()


def run(arguments: argparse.Namespace) -> int:
    config, clock = config_from(arguments), SystemClock()
    progress = Progress(clock, sys.stdout)
    try:
        with local_service(config, progress, clock, arguments.log_level) as address:
            progress(f"ready: {config.model.name} at {address}")
            print_snippets(address, config)
            wait_for_signal()
    except KeyboardInterrupt:
        return 0
    return 0
