"""Counter-based Gumbel noise: a pure function of (seed, choice, position, token), with no generator state.

The uniform bits are the splitmix64 stream whose state is a hash of (seed, choice, position) and whose counter is the
token. All of it is integer arithmetic, so the bits are the same on every device and for every batch composition.
(Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014, constants of variant 13.)
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_BITS: Final = 64
_STRIDE: Final = 0x9E3779B97F4A7C15 - 2**_BITS  # the odd number nearest to 2**64 / golden ratio, as a signed integer
_FIRST_FACTOR: Final = 0xBF58476D1CE4E5B9 - 2**_BITS
_SECOND_FACTOR: Final = 0x94D049BB133111EB - 2**_BITS
_UNIFORM_BITS: Final = 52  # with the added half this is what float64 holds exactly; 53 would round up to 1.0
_CHUNK_ELEMENTS: Final = 2**18  # a working set of a few MiB: the passes over it stay in cache


def gumbel_noise(seed: Tensor, choice: Tensor, position: Tensor, num_tokens: int) -> Tensor:
    """Standard Gumbel noise for every token of a vocabulary.

    Args:
        seed, choice, position: int64 [rows]; any values.
        num_tokens: size of the vocabulary.

    Returns:
        float32 [rows, num_tokens]. Computed in float64 and rounded, so that a last bit in which two devices' logarithms
        differ is lost in the rounding except once in about 2**28 values, and then by one part in 2**24.
    """
    keys = row_keys(seed, choice, position)
    tokens = torch.arange(1, num_tokens + 1, dtype=torch.int64, device=keys.device) * _STRIDE
    noise = torch.empty(len(keys), num_tokens, dtype=torch.float32, device=keys.device)
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // num_tokens)
    for start in range(0, len(keys), rows_per_chunk):
        chunk = slice(start, start + rows_per_chunk)
        uniform = uniform_from_bits(_mix(keys[chunk, None] + tokens))
        noise[chunk] = uniform.log_().neg_().log_().neg_()
    return noise


def row_keys(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """One well mixed 64-bit key for each (seed, choice, position), all int64 [rows]."""
    key = _mix(seed + _STRIDE)
    key = _mix((key ^ choice) + _STRIDE)
    return _mix(_mix((key ^ position) + _STRIDE) + _STRIDE)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit integers in which each input bit moves every output bit."""
    value = (value ^ _shift_right(value, 30)) * _FIRST_FACTOR
    value = (value ^ _shift_right(value, 27)) * _SECOND_FACTOR
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own fills with the sign."""
    return (value >> bits) & ((1 << (_BITS - bits)) - 1)


def uniform_from_bits(bits: Tensor) -> Tensor:
    """float64 strictly between 0 and 1, from the upper bits."""
    return (_shift_right(bits, _BITS - _UNIFORM_BITS).to(torch.float64) + 0.5) * 2.0**-_UNIFORM_BITS
