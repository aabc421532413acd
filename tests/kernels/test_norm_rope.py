from __future__ import annotations

import torch

from eagleray.kernels.norm_rope.api import apply_rope, rms_norm


def test_rms_norm_equals_its_definition() -> None:
    x, weight = torch.randn(5, 3, 8), torch.randn(8)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-3).double(), expected, rtol=1e-6, atol=1e-6)


def test_rms_norm_of_large_half_precision_values_does_not_overflow() -> None:
    x = torch.full((1, 8), 1000.0, dtype=torch.float16)  # its square is beyond float16
    assert torch.equal(rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones(1, 8, dtype=torch.float16))


def test_rope_rotates_each_pair_by_its_angle() -> None:
    query, key = torch.randn(3, 4, 6), torch.randn(3, 2, 6)
    angles = torch.randn(3, 3)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    turn = torch.polar(torch.ones(3, 3), angles)[:, None]
    for rotated, plain in zip(apply_rope(query, key, cos, sin), (query, key), strict=True):
        expected = torch.complex(plain[..., :3], plain[..., 3:]) * turn
        torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), -1))
