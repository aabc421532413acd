"""A target's first layers alone, with its own final norm and output layer: what early exit guesses with."""

from __future__ import annotations

from dataclasses import replace

import torch

from eagleray.kernels.paged_attention.api import plan_attention
from eagleray.models.decoder import Decoder
from eagleray.models.weight_names import checkpoint_views

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2])
POSITIONS = torch.arange(7)
PLAN = plan_attention([0, 7], [0], [[1, 0]], 4, "cpu")


def empty_pool(decoder: Decoder) -> torch.Tensor:
    return torch.full((2, *decoder.layer_group("float32").block_shape(4)), torch.nan)


def test_it_computes_what_a_model_of_the_first_layers_alone_computes(target: Decoder) -> None:
    config = replace(target.config, num_layers=3, sliding_window=(None,) * 3)
    shorter, views = Decoder(config, torch.float32), checkpoint_views(target)
    for name, view in checkpoint_views(shorter).items():
        view.copy_(views[name])
    expected = shorter.compute_logits(shorter.forward(TOKENS, POSITIONS, empty_pool(shorter), PLAN))
    early = target.forward(TOKENS, POSITIONS, empty_pool(target), PLAN, num_layers=3)
    assert torch.equal(target.compute_logits(early), expected)


def test_it_writes_the_keys_and_values_that_the_whole_target_writes_and_no_others(target: Decoder) -> None:
    whole, cut = empty_pool(target), empty_pool(target)
    target.forward(TOKENS, POSITIONS, whole, PLAN)
    target.forward(TOKENS, POSITIONS, cut, PLAN, num_layers=3)
    torch.testing.assert_close(cut[:, :3], whole[:, :3], rtol=0, atol=0, equal_nan=True)
    assert cut[:, 3:].isnan().all()
