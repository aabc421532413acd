"""Training windows: pieces of equal length cut from rows of token ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

KINDS = ("files", "chats")
SEPARATOR_ID = 0  # <|endoftext|>: the first special token of the tokenizer


@dataclasses.dataclass(frozen=True)
class Windows:
    """All windows of one row, in an order that any step can compute anew.

    Each epoch cuts the row at another phase and visits the pieces in another
    order, so a resumed run needs nothing but the number of windows it has used.
    """

    row: np.ndarray
    length: int
    seed: int
    starts_at_documents: bool
    document_starts: np.ndarray

    @classmethod
    def of(cls, row: np.ndarray, length: int, seed: int, starts_at_documents: bool) -> Windows:
        """The windows of a row of documents."""
        starts = np.concatenate([[0], np.flatnonzero(row == SEPARATOR_ID) + 1])
        return cls(row, length, seed, starts_at_documents, starts)

    @property
    def count_per_epoch(self) -> int:
        """Windows in one pass over the row."""
        return (len(self.row) - 2) // self.length - 1

    def window(self, index: int) -> np.ndarray:
        """Window number ``index``: one token longer, as the target is shifted by one."""
        epoch, position = divmod(index, self.count_per_epoch)
        random = np.random.default_rng((self.seed, epoch))
        phase = int(random.integers(self.length))
        start = int(random.permutation(self.count_per_epoch)[position]) * self.length + phase
        if self.starts_at_documents:
            # A chat in use begins at position 0; half a chat there would be a lesson lost.
            place = int(np.searchsorted(self.document_starts, start))
            start = int(self.document_starts[min(place, len(self.document_starts) - 1)])
        start = min(start, len(self.row) - self.length - 1)
        return self.row[start : start + self.length + 1].astype(np.int64)


def load_rows(work_folder: Path, split: str) -> dict[str, np.ndarray]:
    """The token rows of ``train`` or ``held_out``, by kind."""
    return {kind: np.load(work_folder / f"{split}_{kind}.npy") for kind in KINDS}


class Batches:
    """Batches with a given share of chats."""

    def __init__(self, rows: dict[str, np.ndarray], length: int, seed: int) -> None:
        self.length = length
        self._windows = {kind: Windows.of(row, length, seed, kind == "chats") for kind, row in rows.items()}

    def batch(self, step: int, tokens_per_batch: int, chat_share: float) -> torch.Tensor:
        """Batch number ``step``: rows of ``length + 1`` token ids."""
        count = tokens_per_batch // self.length
        chats = round(count * chat_share)
        rows = [self._windows["chats"].window(step * chats + i) for i in range(chats)]
        files = count - chats
        rows += [self._windows["files"].window(step * files + i) for i in range(files)]
        return torch.from_numpy(np.stack(rows))


def held_out_batch(row: np.ndarray, length: int, count: int) -> torch.Tensor:
    """``count`` windows spread evenly over a held-out row."""
    starts = np.linspace(0, len(row) - length - 1, count).astype(int)
    windows = [row[start : start + length + 1].astype(np.int64) for start in starts]
    return torch.from_numpy(np.stack(windows))
