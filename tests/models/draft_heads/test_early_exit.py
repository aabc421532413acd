from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eagleray.core.errors import ConfigError
from eagleray.kernels.paged_attention.api import plan_attention
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.early_exit import EarlyExit
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
    early = EarlyExit(target, 3)
    assert torch.equal(early.compute_logits(early.forward(TOKENS, POSITIONS, empty_pool(target), PLAN)), expected)


def test_it_writes_the_keys_and_values_that_the_whole_target_writes_and_no_others(target: Decoder) -> None:
    whole, cut = empty_pool(target), empty_pool(target)
    target.forward(TOKENS, POSITIONS, whole, PLAN)
    EarlyExit(target, 3).forward(TOKENS, POSITIONS, cut, PLAN)
    torch.testing.assert_close(cut[:, :3], whole[:, :3], rtol=0, atol=0, equal_nan=True)
    assert cut[:, 3:].isnan().all()


@pytest.mark.parametrize("num_layers", [0, 8, -1])
def test_leaving_after_no_layer_or_all_of_them_is_refused(target: Decoder, num_layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_layers={num_layers}: the target has 8 layers; leave after 1 to 7"):
        EarlyExit(target, num_layers)
