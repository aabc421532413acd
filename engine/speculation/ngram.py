"""Drafts without a network: what followed the last time that the request said the same (prompt look-up)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence


def look_up(token_ids: Sequence[int], num_tokens: int, min_ngram: int, max_ngram: int) -> list[int]:
    """Up to ``num_tokens`` tokens that followed the latest earlier occurrence of the last n tokens, for the largest n
    from ``max_ngram`` down to ``min_ngram`` that occurs earlier; empty when none does.

    Saxena, "Prompt Lookup Decoding" (2023).
    """
    tokens = array("q", token_ids)
    haystack = tokens.tobytes()
    width = tokens.itemsize
    for size in range(min(max_ngram, len(tokens) - 1), min_ngram - 1, -1):
        needle = haystack[-size * width :]
        end = len(haystack) - width  # the occurrence may overlap the last tokens, but is not the last tokens
        while (found := haystack.rfind(needle, 0, end)) >= 0:
            if found % width == 0:
                start = found // width + size
                return tokens[start : start + num_tokens].tolist()
            end = found + len(needle) - 1
    return []
