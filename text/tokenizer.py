"""Text to tokens and back: a Hugging Face ``tokenizer.json`` with what a server has to know about it.

Decoding is defined token by token: each token stands for some bytes, and the text is those bytes as UTF-8. That makes
it incremental, and equal to the library's own decoding for byte-level BPE. For byte-fallback tokenizers it differs
only where a run of byte tokens is not valid UTF-8: the library then replaces the whole run, we only the bad bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from eagleray.core.errors import ConfigError
from eagleray.text.pieces import PieceDecoder


class Tokenizer:
    """Encodes prompts and decodes tokens. Safe to share between threads."""

    def __init__(
        self,
        backend: BackendTokenizer,
        *,
        bos_token: str | None = None,
        eos_tokens: Iterable[str | int] = (),
        add_bos_token: bool | None = None,
    ) -> None:
        """``eos_tokens`` are tokens or ids, the main one first. ``add_bos_token`` None: as tokenizer.json says.

        Raises ``ConfigError`` for a special token that is not in the vocabulary or a decoder that we do not know.
        """
        self._backend = backend
        description = json.loads(backend.to_str())
        self._pieces = PieceDecoder.from_json(description["decoder"])
        self._bytes: dict[int, bytes] = {}  # filled on use: most of a large vocabulary is never produced
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token = bos_token
        self.bos_token_id = None if bos_token is None else self._id_of("bos_token", bos_token)
        ids = (token if isinstance(token, int) else self._id_of("eos_token", token) for token in eos_tokens)
        self.eos_token_ids = tuple(dict.fromkeys(ids))
        self._bos_rule = add_bos_token

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a model folder: tokenizer.json and, where they are there, tokenizer_config.json (special
        tokens), generation_config.json and config.json (what ends an answer). Raises ``ConfigError``."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        try:
            backend = BackendTokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare exceptions of its own
            raise ConfigError("model.path", str(path), f"tokenizer.json cannot be read: {error}") from None
        backend.no_truncation()
        backend.no_padding()
        config = read_json(folder / "tokenizer_config.json")
        eos = token_text(config.get("eos_token"))
        return cls(
            backend,
            bos_token=token_text(config.get("bos_token")),
            eos_tokens=[*([] if eos is None else [eos]), *_end_ids(folder)],
            add_bos_token=config.get("add_bos_token"),
        )

    @property
    def eos_token(self) -> str | None:
        """The main end-of-sequence token, as templates write it."""
        return None if not self.eos_token_ids else self._backend.id_to_token(self.eos_token_ids[0])

    def check_fits(self, model_vocab_size: int) -> None:
        """Raises ``ConfigError`` when the tokenizer makes ids that the model has no embedding for."""
        if self.vocab_size > model_vocab_size:
            raise ConfigError(
                "vocab_size",
                model_vocab_size,
                f"the tokenizer has ids up to {self.vocab_size - 1}; resize the model's embeddings to its tokens",
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Special tokens written in the text become single tokens, as templates need."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if not add_special_tokens or self._bos_rule is None or self.bos_token_id is None:
            return ids
        starts = ids[:1] == [self.bos_token_id]
        if self._bos_rule and not starts:
            return [self.bos_token_id, *ids]
        return ids[1:] if starts and not self._bos_rule else ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids`` on their own; bytes that are not UTF-8 become U+FFFD."""
        kept = [id_ for id_ in token_ids if not (skip_special_tokens and id_ in self.special_token_ids)]
        if not kept:
            return ""
        joined = self.first_token_bytes(kept[0]) + b"".join(map(self.token_bytes, kept[1:]))
        return joined.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for within a text; empty for an id that the vocabulary does not have."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = self._bytes[token_id] = b"" if token is None else self._pieces.token_bytes(token)
        return known

    def first_token_bytes(self, token_id: int) -> bytes:
        """What the token stands for at the very start of a text, where some tokenizers drop the prefix space."""
        return self._pieces.without_prefix_space(self.token_bytes(token_id))

    def token_text(self, token_id: int) -> str:
        """The token alone, as log-probabilities show it; U+FFFD where it holds part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _id_of(self, field: str, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ConfigError(field, token, "is not in tokenizer.json; correct tokenizer_config.json")
        return int(token_id)


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object, or an empty one when there is no such file. Raises ``ConfigError`` when it is broken."""
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError("model.path", str(file), f"cannot be read: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError("model.path", str(file), "must hold a JSON object")
    return loaded


def token_text(entry: object) -> str | None:
    """A special token of tokenizer_config.json: text, or an object with ``content``."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) and content else None


def _end_ids(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []
