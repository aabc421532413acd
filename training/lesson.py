"""What a batch of documents teaches: what the target computes for them, token by token.

Suffixes name dimensions: B documents, T tokens of the longest, N tokens of all of them one behind the other, R chains
of guesses, C channels, V words of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eagleray.kernels.paged_attention.api import AttentionPlan, plan_attention
from eagleray.models.decoder import Decoder
from eagleray.training.texts import Document

_BLOCK_SIZE_TOKENS: Final = 16
_DTYPE_NAMES: Final = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, slots=True)
class Lesson:
    """Chain s of a document starts when tokens 0 to s + 1 are known; its guess of depth d is for token s + 1 + d."""

    token_ids_BT: Tensor  # int64, padded with zeros
    lengths_B: Tensor
    prompt_lengths_B: Tensor
    features_BTC: Tensor  # float32: as ``Decoder.forward_with_features`` gives them
    probabilities_NV: Tensor  # of the token after each, of those in the draft vocabulary

    def chains(self, depth: int) -> tuple[Tensor, Tensor]:
        """Where a guess of this depth is for a token of the answer: documents [R] and starts s [R], int64."""
        starts_T = torch.arange(self.token_ids_BT.shape[1])
        is_asked_BT = starts_T >= self.prompt_lengths_B[:, None] - 1
        has_answer_BT = starts_T + 1 + depth < self.lengths_B[:, None]
        documents_R, starts_R = torch.nonzero(is_asked_BT & has_answer_BT, as_tuple=True)
        return documents_R, starts_R

    def label_rows(self, depth: int) -> Tensor:
        """Rows of ``probabilities_NV`` for ``chains(depth)``, [R]."""
        documents_R, starts_R = self.chains(depth)
        first_rows_B = self.lengths_B.cumsum(0) - self.lengths_B
        return first_rows_B[documents_R] + starts_R + depth


@dataclass(frozen=True, slots=True)
class Teacher:
    """A loaded target, computing with the kernels that serve it."""

    decoder: Decoder
    capture_layers: tuple[int, ...]  # none: the head reads the final hidden states
    draft_vocabulary_V: Tensor | None = None  # int64 ids of the target; None: all of them

    @torch.no_grad()  # not inference mode, whose tensors nothing can be learned from
    def teach(self, documents: Sequence[Document]) -> Lesson:
        """Compute whole documents, each from its first token on."""
        lengths = [len(document.token_ids) for document in documents]
        starts = list(accumulate(lengths, initial=0))
        token_ids_N = torch.tensor([token_id for document in documents for token_id in document.token_ids])
        positions_N = torch.cat([torch.arange(length) for length in lengths])
        plan, pool = self._memory(lengths, starts)
        hidden_NC, features_NC = self.decoder.forward_with_features(
            token_ids_N, positions_N, pool, plan, self.capture_layers
        )
        logits_NV = self.decoder.compute_logits(hidden_NC)
        if self.draft_vocabulary_V is not None:
            logits_NV = logits_NV[:, self.draft_vocabulary_V]
        return Lesson(
            _padded(token_ids_N, lengths),
            torch.tensor(lengths),
            torch.tensor([document.num_prompt_tokens for document in documents]),
            _padded(features_NC.float(), lengths),
            logits_NV.softmax(-1),
        )

    def _memory(self, lengths: Sequence[int], starts: Sequence[int]) -> tuple[AttentionPlan, Tensor]:
        """The attention's plan, and KV for all tokens."""
        num_blocks = [-(-length // _BLOCK_SIZE_TOKENS) for length in lengths]
        ends = accumulate(num_blocks)
        tables = [range(end - count, end) for count, end in zip(num_blocks, ends, strict=True)]
        group = self.decoder.layer_group(_DTYPE_NAMES[self.decoder.dtype])
        pool = torch.zeros((sum(num_blocks), *group.block_shape(_BLOCK_SIZE_TOKENS)), dtype=self.decoder.dtype)
        return plan_attention(starts, [0] * len(lengths), tables, _BLOCK_SIZE_TOKENS, "cpu"), pool


def _padded(values_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """[N, ...] -> [B, T, ...]."""
    return pad_sequence(list(torch.split(values_N, list(lengths))), batch_first=True)
