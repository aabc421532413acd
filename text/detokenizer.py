"""Tokens to text, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from eagleray.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Releases each character with the token that completes it; work per token is proportional to its own bytes.

    All pushes and ``flush`` together give the tokens' text after the prompt: the same as decoding them on their own,
    but for the prefix space that some tokenizers drop at the start of a text, which stays when the prompt has text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Iterable[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._at_start = all(token_id in self._skipped for token_id in prompt_token_ids)
        self._partial = b""  # of a character that later tokens complete

    def push(self, token_id: int) -> str:
        """The characters that ``token_id`` completes; empty for a skipped special token or part of a character."""
        if token_id in self._skipped:
            return ""
        if self._at_start:
            self._at_start = False
            data = self._tokenizer.first_token_bytes(token_id)
        else:
            data = self._partial + self._tokenizer.token_bytes(token_id)
        text, num_used = codecs.utf_8_decode(data, "replace", False)
        self._partial = data[num_used:]
        return text

    def flush(self) -> str:
        """U+FFFD for a character that was begun and never completed."""
        text, _ = codecs.utf_8_decode(self._partial, "replace", True)
        self._partial = b""
        return text
