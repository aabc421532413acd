"""In which order documents are learned: a function of the seed alone, so that a resumed run sees what it would have."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

from eagleray.training.texts import Document

_POOL_BATCHES: Final = 50  # documents for so many are sorted by length together: hardly any padding, and still mixed


def epoch_batches(documents: Sequence[Document], batch_tokens: int, seed: int, epoch: int) -> list[list[Document]]:
    """All documents once, in batches of about ``batch_tokens``, padding included, of documents of similar length."""
    draw = random.Random(f"{seed} {epoch}")
    shuffled = list(documents)
    draw.shuffle(shuffled)
    batches: list[list[Document]] = []
    for pool in _cut(shuffled, _POOL_BATCHES * batch_tokens, padded=False):
        batches += _cut(sorted(pool, key=lambda document: len(document.token_ids)), batch_tokens, padded=True)
    draw.shuffle(batches)
    return batches


def _cut(documents: Sequence[Document], max_tokens: int, *, padded: bool) -> Iterator[list[Document]]:
    """Parts of at most ``max_tokens``, but of one document at least."""
    part: list[Document] = []
    total = longest = 0
    for document in documents:
        longest = max(longest, len(document.token_ids))
        total += len(document.token_ids)
        if part and (longest * (len(part) + 1) if padded else total) > max_tokens:
            yield part
            part, total, longest = [], len(document.token_ids), len(document.token_ids)
        part.append(document)
    if part:
        yield part
