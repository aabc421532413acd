"""``eagleray doctor``: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Final

from eagleray.cli.check_software import check_software
from eagleray.cli.finding import Finding, Level
from eagleray.cli.set_option import add_set_argument

EXIT_MISSING: Final = 1
_LEFT_OUT: Final = "correct it: the checks of hardware, transports, model, index and port need it and were left out"
_COLOURS: Final = {Level.OK: "32", Level.WARN: "33", Level.MISSING: "31"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="check for this configuration")
    parser.add_argument("--model", dest="model.path", metavar="PATH", help="folder in Hugging Face format, or 'demo'")
    add_set_argument(parser)
    parser.add_argument("--json", action="store_true", help="all findings as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    findings = []
    for finding in _examine(arguments):
        findings.append(finding)
        if not arguments.json:
            print(_line(finding), flush=True)
    is_well = all(finding.level is not Level.MISSING for finding in findings)
    if arguments.json:
        print(json.dumps({"ok": is_well, "findings": [dataclasses.asdict(finding) for finding in findings]}, indent=2))
    return 0 if is_well else EXIT_MISSING


def _examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Findings as they are made. Without its packages the rest of eagleray cannot be imported, nor checked, and without
    a configuration it is not known for what."""
    software = check_software()
    yield from software
    if any(finding.level is Level.MISSING for finding in software):
        return
    from eagleray.cli.check_hardware import check_hardware
    from eagleray.cli.check_service import check_service
    from eagleray.cli.check_transports import check_transports
    from eagleray.cli.options import config_from
    from eagleray.core.config import read_environment
    from eagleray.core.errors import ConfigError

    try:
        config = config_from(arguments)
    except ConfigError as error:
        yield Finding(Level.MISSING, "configuration", str(error), _LEFT_OUT)
        return
    yield from check_hardware(config)
    yield from check_transports(config.transfer)
    yield from check_service(config, read_environment())


def _line(finding: Finding) -> str:
    level = finding.level.value.ljust(8)
    if sys.stdout.isatty():
        level = f"\x1b[{_COLOURS[finding.level]}m{level}\x1b[0m"
    way_out = f"\n{'':28}-> {finding.way_out}" if finding.way_out else ""
    return f"{level}{finding.name:19} {finding.text}{way_out}"
