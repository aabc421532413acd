"""Counter-based Gumbel noise: a pure function of (seed, choice, position, token), with no generator state.

The uniform bits are the splitmix64 stream whose state is a hash of (seed, choice, position) and whose counter is the
token. That is integer arithmetic, and the logarithm a fixed sequence of rounded operations: the noise is the same, bit
for bit, on every device, in every implementation and for every batch composition.
(Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014, constants of variant 13.)
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

NO_TOKEN: Final = -1
_BITS: Final = 64
_STRIDE: Final = 0x9E3779B97F4A7C15 - 2**_BITS  # the odd number nearest to 2**64 / golden ratio, as a signed integer
_FIRST_FACTOR: Final = 0xBF58476D1CE4E5B9 - 2**_BITS
_SECOND_FACTOR: Final = 0x94D049BB133111EB - 2**_BITS
_UNIFORM_BITS: Final = 52  # with the added half this is what float64 holds exactly; 53 would round up to 1.0
_CHUNK_ELEMENTS: Final = 2**16  # half a MiB of float64: the passes over it stay in cache
_SQRT_HALF_BITS: Final = 0x3FE6A09E667F3BCD
_LN_2: Final = 0.6931471805599453
_MANTISSA_BITS: Final = 52


def gumbel_noise(seed: Tensor, choice: Tensor, position: Tensor, num_tokens: int) -> Tensor:
    """Standard Gumbel noise, float32 [rows, num_tokens], for every token of a vocabulary of ``num_tokens``;
    ``seed``, ``choice`` and ``position`` are int64 [rows] of any values."""
    token_ids = torch.arange(num_tokens, dtype=torch.int64, device=seed.device)
    keys = row_keys(seed, choice, position)
    noise = torch.empty(len(keys), num_tokens, dtype=torch.float32, device=keys.device)
    rows_per_chunk = max(1, _CHUNK_ELEMENTS // num_tokens)
    for start in range(0, len(keys), rows_per_chunk):
        chunk = slice(start, start + rows_per_chunk)
        noise[chunk] = token_noise(keys[chunk, None], token_ids)
    return noise


def token_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """float32 noise of single tokens: int64 ``keys`` of ``row_keys`` and ``token_ids`` are broadcast."""
    uniform = token_uniform(keys, token_ids)
    return fixed_log(fixed_log(uniform).neg_()).neg_().to(torch.float32)


def token_uniform(keys: Tensor, token_ids: Tensor | int) -> Tensor:
    """float64 strictly between 0 and 1, one number for each key and token. ``NO_TOKEN`` gives one more per key."""
    return uniform_from_bits(_mix(keys + (token_ids + 1) * _STRIDE))


def row_keys(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """One well mixed 64-bit key for each (seed, choice, position), all int64 [rows]."""
    key = _mix(seed + _STRIDE)
    key = _mix((key ^ choice) + _STRIDE)
    return _mix(_mix((key ^ position) + _STRIDE) + _STRIDE)


def uniform_from_bits(bits: Tensor) -> Tensor:
    """float64 strictly between 0 and 1, from the upper bits."""
    return (_shift_right(bits, _BITS - _UNIFORM_BITS).to(torch.float64) + 0.5) * 2.0**-_UNIFORM_BITS


def fixed_log(x: Tensor) -> Tensor:
    """Natural logarithm of float64 ``x``, positive and normal, to about one part in 10^10.

    Libraries' logarithms differ in their last bit. This one is a fixed sequence of operations that IEEE 754 defines
    to the bit, and so the same on every device: x = 2^k m with m next to 1, and the series of
    log m = 2 artanh((m - 1) / (m + 1)).
    """
    bits = x.view(torch.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS  # of x / sqrt(1/2)
    mantissa = (bits - (exponent << _MANTISSA_BITS)).view(torch.float64)
    ratio = (mantissa - 1.0).div_(mantissa.add_(1.0))
    square = ratio * ratio
    series = torch.full_like(square, 2.0 / 11)
    for divisor in (9, 7, 5, 3, 1):
        series.mul_(square).add_(2.0 / divisor)
    return exponent.to(torch.float64).mul_(_LN_2).add_(ratio.mul_(series))


def _mix(value: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit integers in which each input bit moves every output bit."""
    value = (value ^ _shift_right(value, 30)) * _FIRST_FACTOR
    value = (value ^ _shift_right(value, 27)) * _SECOND_FACTOR
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own fills with the sign."""
    return (value >> bits) & ((1 << (_BITS - bits)) - 1)
