"""Rotary position embedding: frequencies per head dimension, and the angles of a step's positions."""

from __future__ import annotations

import math

import torch

from eagleray.kernels.select import TORCH_KERNELS, Kernels
from eagleray.models.model_config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


class RotaryEmbedding:
    """Angles are computed per step rather than looked up: a table of a long context would be larger than a layer."""

    def __init__(
        self, config: RopeConfig, head_dim: int, device: torch.device | str, kernels: Kernels = TORCH_KERNELS
    ) -> None:
        scaling = config.scaling
        self._rotary_angles = kernels.rotary_angles
        self._frequencies = inverse_frequencies(config, head_dim).to(device)  # [D / 2]
        self._magnitude = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0

    def angles(
        self, positions_T: torch.Tensor, dtype: torch.dtype, shift: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for ``positions_T + shift``, [T, D] each, both halves alike; computed in float32, then
        rounded to ``dtype``."""
        return self._rotary_angles(positions_T, shift, self._frequencies, self._magnitude, dtype)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, [D / 2] float32, with the scaling applied."""
    periods = config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaling = config.scaling
    if isinstance(scaling, LinearScaling):
        return 1.0 / periods / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(1.0 / periods, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(periods, scaling, config.theta)
    return 1.0 / periods  # also dynamic scaling, which is served where it changes nothing


def _llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 1: keep (short wavelength), 0: divide by the factor (long), and a straight line in between.
    keep = ((scaling.original_max_tokens / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def _yarn(periods: torch.Tensor, scaling: YarnScaling, theta: float) -> torch.Tensor:
    num_pairs = len(periods)

    def pair_turning(num_turns: float) -> float:
        """The pair of dimensions, as a fraction, that makes so many turns over the original length."""
        return num_pairs * math.log(scaling.original_max_tokens / (num_turns * 2 * math.pi)) / math.log(theta)

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper bound counts dimensions, not pairs: so in the paper's code, and checkpoints are trained with it.
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    width = high - low or 0.001  # keeps the ramp finite
    keep = 1 - ((torch.arange(num_pairs, dtype=torch.float32) - low) / width).clamp(0, 1)
    return 1.0 / (scaling.factor * periods) * (1 - keep) + 1.0 / periods * keep
