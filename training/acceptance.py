"""How far guesses get on documents that the head has not learned from: what an engine would measure, without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagleray.training.batches import epoch_batches
from eagleray.training.lesson import Lesson, Teacher
from eagleray.training.texts import Document
from eagleray.training.trainee import Trainee


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Of chains of guesses, each the head's likeliest token."""

    by_depth: tuple[float, ...]  # share of an answer's positions from where all guesses up to it come true
    tokens_per_step: float  # when every verification, of a chain that long, starts where the last one ended


@torch.no_grad()
def measure_acceptance(
    trainee: Trainee, teacher: Teacher, documents: Sequence[Document], chain_length: int, batch_tokens: int
) -> Acceptance:
    """On whole documents, in float32. Chains follow the documents' own tokens."""
    hits, chances = [0] * trainee.num_guesses, [0] * trainee.num_guesses
    num_tokens = num_steps = 0
    for batch in epoch_batches(documents, batch_tokens, seed=0, epoch=0):
        lesson = teacher.teach(batch)
        lengths_BT = _accepted_lengths(trainee, lesson, teacher.draft_vocabulary_V)
        for document, lengths_T in zip(batch, lengths_BT, strict=True):
            first, end = document.num_prompt_tokens - 1, len(document.token_ids)
            for depth in range(1, trainee.num_guesses + 1):
                asked = lengths_T[first : max(first, end - 1 - depth)]
                hits[depth - 1] += int((asked >= depth).sum())
                chances[depth - 1] += len(asked)
            num_tokens += max(0, end - 2 - first)
            num_steps += _num_steps(lengths_T.clamp(max=chain_length).tolist(), first, end)
    by_depth = tuple(hit / max(1, chance) for hit, chance in zip(hits, chances, strict=True))
    return Acceptance(by_depth, num_tokens / max(1, num_steps))


def _accepted_lengths(trainee: Trainee, lesson: Lesson, draft_vocabulary_V: Tensor | None) -> Tensor:
    """Per document and start of a chain, how many guesses in a row are the document's own tokens: int64 [B, T]."""
    lengths_BT = torch.zeros_like(lesson.token_ids_BT)
    for depth, logits_RV in enumerate(trainee.guess(lesson), start=1):
        documents_R, starts_R = lesson.chains(depth)
        guesses_R = logits_RV.argmax(-1)
        if draft_vocabulary_V is not None:
            guesses_R = draft_vocabulary_V[guesses_R]
        is_right_R = guesses_R == lesson.token_ids_BT[documents_R, starts_R + 1 + depth]
        lengths_BT[documents_R, starts_R] += is_right_R & (lengths_BT[documents_R, starts_R] == depth - 1)
    return lengths_BT


def _num_steps(accepted_T: Sequence[int], first: int, end: int) -> int:
    """Verifications until all tokens are there. The prompt's own step brings the first, and its chain of guesses."""
    start, count = first, 0
    while start + 2 < end:
        start += accepted_T[start] + 1
        count += 1
    return count
