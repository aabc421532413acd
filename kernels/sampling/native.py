"""Choosing the next token by the native library."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from eagleray.kernels.native.arguments import require, rows_of
from eagleray.kernels.native.library import NativeLibrary, address
from eagleray.kernels.sampling import reference
from eagleray.kernels.sampling.batch import MinP, RandomRows, SamplingBatch, SharedNoise, TopKTopP


def sample_tokens(library: NativeLibrary, logits: Tensor, batch: SamplingBatch) -> Tensor:
    """See ``api.sample_tokens``."""
    logits = reference.adjust(logits, batch)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    random = batch.random
    if random is not None and len(random.rows) == len(logits):
        return sample_random(library, logits, random)
    token_ids = torch.empty(len(logits), dtype=torch.int64)
    library.argmax_rows(logits.data_ptr(), logits.stride(0), token_ids.data_ptr(), *logits.shape, library.num_threads)
    if random is not None:
        token_ids[random.rows] = sample_random(library, logits, random)
    return token_ids


def sample_random(library: NativeLibrary, logits: Tensor, random: RandomRows) -> Tensor:
    """See ``reference.sample_random``; each row of ``logits`` contiguous. Raises ``IndexError`` for a row that is none
    of ``logits``."""
    if logits.dtype is not torch.float32 or logits.stride(-1) != 1:
        raise ValueError(f"logits are {logits.dtype} with strides {logits.stride()}; rows must be contiguous float32")
    num_draws, vocab_size = len(random.rows), logits.shape[1]
    per_draw = {"rows": random.rows, "seed": random.seed, "choice": random.choice, "position": random.position}
    for name, values in per_draw.items():
        require(values, (num_draws,), torch.int64, name)
    require(random.temperature, (num_draws,), torch.float32, "temperature")
    truncation = _top_k_top_p(random.top_k_top_p, num_draws, vocab_size)
    lowest_score = _lowest_score(random.min_p, num_draws)
    token_ids, keys = torch.empty(num_draws, dtype=torch.int64), torch.empty(num_draws, vocab_size, dtype=torch.int64)
    draws = (random.rows, random.temperature, random.seed, random.choice, random.position, *truncation, lowest_score)
    status = library.sample_rows(
        logits.data_ptr(),
        logits.stride(0),
        *logits.shape,
        (ctypes.c_void_p * len(draws))(*(None if values is None else values.data_ptr() for values in draws)),
        keys.data_ptr(),
        token_ids.data_ptr(),
        num_draws,
        library.num_threads,
    )
    if status != 0:
        raise IndexError(f"rows {random.rows.tolist()} are not all within the {len(logits)} rows of logits")
    return token_ids


def guess_tokens(library: NativeLibrary, logits: Tensor, noise: SharedNoise, token_ids: Tensor | None) -> Tensor:
    """See ``api.guess_tokens``."""
    num_rows, vocab_size = logits.shape
    if logits.dtype is not torch.float32:
        raise ValueError(f"logits are {logits.dtype}; they must be float32")
    logits = rows_of(logits)
    require(noise.temperature, (num_rows,), torch.float32, "temperature")
    for name, values in {"seed": noise.seed, "choice": noise.choice, "position": noise.position}.items():
        require(values, (num_rows,), torch.int64, name)
    if token_ids is not None:
        require(token_ids, (vocab_size,), torch.int64, "token_ids")
    out = torch.empty(num_rows, dtype=torch.int64)
    library.guess_rows(
        logits.data_ptr(),
        logits.stride(0),
        address(token_ids),
        noise.temperature.data_ptr(),
        noise.seed.data_ptr(),
        noise.choice.data_ptr(),
        noise.position.data_ptr(),
        out.data_ptr(),
        num_rows,
        vocab_size,
        library.num_threads,
    )
    return out


def _top_k_top_p(truncation: TopKTopP | None, num_draws: int, vocab_size: int) -> tuple[Tensor | None, Tensor | None]:
    """int64 and float64 [num_draws]."""
    if truncation is None:
        return None, None
    top_k = torch.full((num_draws,), vocab_size)
    top_p = torch.ones(num_draws, dtype=torch.float64)
    top_k[truncation.rows], top_p[truncation.rows] = truncation.top_k, truncation.top_p
    return top_k, top_p


def _lowest_score(truncation: MinP | None, num_draws: int) -> Tensor | None:
    """float32 [num_draws]: what is below it, relative to the best, is cut off."""
    if truncation is None:
        return None
    lowest = torch.full((num_draws,), -math.inf)
    lowest[truncation.rows] = truncation.min_p.log()
    return lowest
