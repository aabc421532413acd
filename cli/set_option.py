"""``--set``, for every command that takes a configuration. Uses the standard library only: ``doctor`` has it too."""

from __future__ import annotations

import argparse


def add_set_argument(parser: argparse._ActionsContainer) -> None:
    """``options.config_from`` reads it."""
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        metavar="KEY=VALUE",
        help="any key of the configuration, for example router.policy=least_loaded; may be repeated",
    )
