"""Options that several commands share. One that is not given leaves no trace: defaults live where the value is used.

The ``dest`` of an option is the field that it sets, ``section.field``; argparse keeps it as an attribute of that name.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, Final

import yaml
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from eagleray.cli.set_option import add_set_argument
from eagleray.core.config import Config, load_config
from eagleray.core.config_sections import section_of
from eagleray.core.errors import ConfigError

_KEY_COLUMN: Final = 38


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", dest="model.path", metavar="PATH", help="folder in Hugging Face format, or 'demo'")
    group.add_argument("--dtype", dest="model.dtype", metavar="DTYPE", help="auto, float32, bfloat16 or float16")
    group.add_argument("--quantization", dest="model.quantization", metavar="FORMAT", help="w8a8, int8 or int4")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A YAML file, short options for the keys that are set most often, and ``--set`` for all others."""
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="configuration file; options come on top")
    add_model_arguments(parser)
    group = parser.add_argument_group("service")
    group.add_argument("--prefill", dest="prefill.replicas", type=int, metavar="N", help="prefill workers; 0: none")
    group.add_argument("--decode", dest="decode.replicas", type=int, metavar="N", help="decode workers")
    group.add_argument(
        "--memory", dest="memory.budget_bytes", metavar="SIZE", help="all that it may take, for example 6GiB"
    )
    group.add_argument("--host", dest="http.host", metavar="HOST", help="address to listen on")
    add_port_argument(group)
    add_set_argument(group)


def add_port_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--port", dest="http.port", type=int, metavar="PORT", help="port to listen on; 0: any free one")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", dest="sampling.max_tokens", type=int, metavar="N", help="longest answer")
    group.add_argument(
        "--temperature", dest="sampling.temperature", type=float, metavar="T", help="0: always the likeliest token"
    )
    group.add_argument(
        "--top-p", dest="sampling.top_p", type=float, metavar="P", help="sample from this share of probability"
    )
    group.add_argument("--top-k", dest="sampling.top_k", type=int, metavar="K", help="sample from so many tokens")
    group.add_argument(
        "--seed", dest="sampling.seed", type=int, metavar="N", help="the same seed gives the same answer"
    )
    group.add_argument("--stop", dest="sampling.stop", action="append", metavar="TEXT", help="may be repeated")


def given(arguments: argparse.Namespace, section: str) -> dict[str, Any]:
    """Options of ``section`` that the user gave, by field."""
    prefix = f"{section}."
    values = vars(arguments).items()
    return {name.removeprefix(prefix): value for name, value in values if name.startswith(prefix) and value is not None}


def config_from(arguments: argparse.Namespace) -> Config:
    """File, then options, then ``--set``. Raises ``ConfigError``."""
    overrides: dict[str, Any] = {}
    for section in Config.model_fields:
        for field, value in given(arguments, section).items():
            _put(overrides, f"{section}.{field}", value)
    for assignment in getattr(arguments, "assignments", None) or ():
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError("--set", assignment, "write it as key.path=value, for example --set http.port=8001")
        _put(overrides, key.strip(), _parsed(key, text))
    return load_config(getattr(arguments, "config", None), overrides)


def describe_keys() -> str:
    """All keys of the configuration with their defaults and meanings, for ``--help``."""
    return "\n".join(["keys of the configuration, for CONFIG.yaml and --set:", *_describe(Config, "", {})])


def _put(overrides: dict[str, Any], key: str, value: object) -> None:
    *sections, field = key.split(".")
    for section in sections:
        below = overrides.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(key, value, f"{section} is given a value of its own as well; keep one of the two")
        overrides = below
    overrides[field] = value


def _parsed(key: str, text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"--set {key}", text, "is not valid YAML; put text with special characters in quotes"
        ) from None


def _describe(model: type[BaseModel], prefix: str, described: dict[type[BaseModel], str]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not field.annotation:  # of its own it has a value where it is no section, or may be none
            yield _describe_field(prefix + name, field)
        if section is None:
            continue
        if section in described:
            yield f"  {prefix}{name}.*".ljust(_KEY_COLUMN) + f"  as {described[section]}.*"
        else:
            described[section] = prefix + name
            yield from _describe(section, f"{prefix}{name}.", described)


def _describe_field(key: str, field: FieldInfo) -> str:
    default = " (must be set)" if field.is_required() else f" = {_as_yaml(field.default)}"
    return (f"  {key}{default}".ljust(_KEY_COLUMN) + f"  {field.description or ''}").rstrip()


def _as_yaml(default: object) -> str:
    plain = int(default) if isinstance(default, ByteSize) else list(default) if isinstance(default, tuple) else default
    text: str = yaml.safe_dump(plain, default_flow_style=True)
    return text.split("\n")[0]
