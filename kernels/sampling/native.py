"""Choosing the next token by the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from eagleray.kernels.native.arguments import require
from eagleray.kernels.native.library import NativeLibrary
from eagleray.kernels.sampling import reference
from eagleray.kernels.sampling.batch import RandomRows, SamplingBatch


def sample_tokens(library: NativeLibrary, logits: Tensor, batch: SamplingBatch) -> Tensor:
    """See ``api.sample_tokens``."""
    logits = reference.adjust(logits, batch)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    require(logits[:1], (min(1, len(logits)), logits.shape[1]), torch.float32, "logits")
    random = batch.random
    if random is not None and len(random.rows) == len(logits):
        return sample_random(library, logits, random)
    token_ids = torch.empty(len(logits), dtype=torch.int64)
    library.argmax_rows(logits.data_ptr(), logits.stride(0), token_ids.data_ptr(), *logits.shape, library.num_threads)
    if random is not None:
        token_ids[random.rows] = sample_random(library, logits, random)
    return token_ids


def sample_random(library: NativeLibrary, logits: Tensor, random: RandomRows) -> Tensor:
    """See ``reference.sample_random``. Raises ``IndexError`` for a row that is none of ``logits``."""
    num_drawn = len(random.rows)
    rows, temperature = random.rows, random.temperature
    if random.top_k_top_p is not None or random.min_p is not None:
        logits = reference.truncated_scores(logits, random)
        rows, temperature = torch.arange(num_drawn), torch.ones(num_drawn)
    token_ids = torch.empty(num_drawn, dtype=torch.int64)
    require(rows, (num_drawn,), torch.int64, "rows")
    require(temperature, (num_drawn,), torch.float32, "temperature")
    counters = {"seed": random.seed, "choice": random.choice, "position": random.position}
    for name, counter in counters.items():
        require(counter, (num_drawn,), torch.int64, name)
    status = library.sample_rows(
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        rows.data_ptr(),
        temperature.data_ptr(),
        *(counter.data_ptr() for counter in counters.values()),
        token_ids.data_ptr(),
        num_drawn,
        library.num_threads,
    )
    if status != 0:
        raise IndexError(f"rows {rows.tolist()} are not all within the {len(logits)} rows of logits")
    return token_ids
