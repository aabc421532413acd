"""Which bytes a vocabulary entry stands for, read from the ``decoder`` of a tokenizer.json.

Two families cover the language models there are: byte-level BPE (GPT-2's table of printable stand-ins for bytes) and
SentencePiece-like vocabularies (a stand-in for the space, ``<0xE4>`` for single bytes, a prefix space dropped).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from eagleray.core.errors import ConfigError

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class PieceDecoder:
    """How one vocabulary spells bytes."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    dropped_spaces: int | None = 0  # leading spaces that a text loses; None: all those of its first token

    @classmethod
    def from_json(cls, decoder: Mapping[str, Any] | None) -> PieceDecoder:
        """Raises ``ConfigError`` for a decoder that is not made of the steps we know."""
        steps = [] if decoder is None else list(_steps(decoder))
        kinds = {step["type"] for step in steps}
        unknown = kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
        if unknown or not kinds & {"ByteLevel", "Metaspace", "Replace", "ByteFallback"}:
            raise ConfigError(
                "tokenizer.json decoder",
                sorted(unknown) or None,
                "byte-level and SentencePiece-like tokenizers are served; convert the tokenizer to one of them",
            )
        return cls(
            byte_level="ByteLevel" in kinds,
            byte_fallback="ByteFallback" in kinds,
            replacements=tuple(_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")),
            dropped_spaces=_dropped_spaces(steps),
        )

    def token_bytes(self, token: str) -> bytes:
        """The bytes of one vocabulary entry within a text."""
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match.group(1), 16)])
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        if self.byte_level and all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        return token.encode()

    def without_prefix_space(self, piece: bytes) -> bytes:
        """``piece`` as the first of a text."""
        if self.dropped_spaces is None:
            return piece.replace(b" ", b"")
        spaces = len(piece) - len(piece.lstrip(b" "))
        return piece[min(spaces, self.dropped_spaces) :]


def _steps(decoder: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if decoder["type"] != "Sequence":
        return (decoder,)
    return (step for inner in decoder["decoders"] for step in _steps(inner))


def _replacement(step: Mapping[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    pattern = step["pattern"].get("String")
    if pattern is None:
        raise ConfigError("tokenizer.json decoder", step["pattern"], "only plain strings are replaced, not patterns")
    return pattern, step["content"]


def _dropped_spaces(steps: Iterable[Mapping[str, Any]]) -> int | None:
    for step in steps:
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return None
        if step["type"] == "Strip" and step["content"] == " ":
            return int(step["start"])
    return 0


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where it is a visible Latin-1 character, else one from 256 up.

    (Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*.)
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}


_BYTE_OF_CHAR: Final = {char: byte for byte, char in byte_alphabet().items()}
