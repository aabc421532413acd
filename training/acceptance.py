"""How far guesses get on documents that a head has not learned from: what an engine would count, without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.training.batches import epoch_batches
from eagleray.training.lesson import Lesson, Teacher
from eagleray.training.texts import Document
from eagleray.training.trainee import Trainee


@torch.no_grad()
def measure_acceptance(
    trainee: Trainee, teacher: Teacher, documents: Sequence[Document], chain_length: int, batch_tokens: int
) -> Acceptance:
    """Of chains of the head's likeliest tokens, where each begins behind the last one's end.

    Answers are taken for the target's own. For greedy ones that is what an engine counts; where tokens were drawn, its
    guesses share the target's luck and get further.
    """
    steps: list[Acceptance] = []
    for batch in epoch_batches(documents, batch_tokens, seed=0, epoch=0):
        lesson = teacher.teach(batch)
        lengths_BT = _accepted_lengths(trainee, lesson, teacher.draft_vocabulary_V).clamp(max=chain_length)
        for document, lengths in zip(batch, lengths_BT.tolist(), strict=True):
            steps += _steps(lengths, document.num_prompt_tokens - 1, len(document.token_ids), chain_length)
    return total_acceptance(steps) or Acceptance()


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


def _steps(accepted_T: Sequence[int], first: int, end: int, chain_length: int) -> Iterator[Acceptance]:
    """Verifications until all tokens are there. The prompt's own step brings the first, and a chain of guesses."""
    start = first
    while start + 2 < end:
        # A guess for the last token brings that one and nothing after it.
        num_accepted = min(accepted_T[start], end - start - 3)
        yield Acceptance.of_step(chain_length, chain_length, num_accepted, 0.0, 0.0)
        start += num_accepted + 1
