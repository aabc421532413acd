from __future__ import annotations

import torch

from eagleray.kernels.sampling.reference import weights_of


def test_weights_are_the_exponential_to_the_precision_of_float32() -> None:
    scores = -torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 12
    expected = scores.double().exp() * 2**40
    assert ((weights_of(scores) - expected).abs() / expected).max() < 1.5e-7


def test_weights_fall_with_the_score_down_to_zero() -> None:
    scores = -torch.arange(0, 40, 0.001)
    weights = weights_of(torch.cat((scores, torch.tensor([-1e30, -float("inf")]))))
    assert (weights.diff() <= 0).all()
    assert weights[0] - 2**40 in range(-(2**12), 2**12)
    assert weights[28_000:].max() == 0
