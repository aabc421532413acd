"""Typed reading of a checkpoint's ``config.json``: every complaint names the field, its value and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eagleray.core.errors import ConfigError


class Fields:
    """A JSON object of a checkpoint. A field that is null counts as missing, as in Hugging Face transformers."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix

    def raw(self, name: str) -> Any:
        """The value as written, or None."""
        return self._values.get(name)

    def names(self) -> list[str]:
        """Fields that are set."""
        return [name for name, value in self._values.items() if value is not None]

    def section(self, name: str) -> Fields | None:
        """A nested object, or None if it is missing or empty."""
        value = self.raw(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(name, "must be an object")
        return Fields(value, f"{self._prefix}{name}.") if value else None

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number. Raises ``ConfigError`` if it is too small, or missing without a default."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"must be a whole number from {minimum} up")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number. Raises ``ConfigError`` if it is missing and there is no default."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(name, "must be a positive number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._required(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """Like ``integer``, but a null that is written out means None, not the default."""
        if name in self._values and self._values[name] is None:
            return None
        return None if self.raw(name) is None and default is None else self.integer(name, default)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them; empty if missing."""
        value = self.raw(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
            raise self.error(name, "must be a token id or a list of token ids")
        return tuple(ids)

    def error(self, name: str, way_out: str) -> ConfigError:
        return ConfigError(f"config.json: {self._prefix}{name}", self.raw(name), way_out)

    def _required(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        if value is None and default is None:
            raise self.error(name, "is missing; take the config.json that the checkpoint was published with")
        return default if value is None else value
