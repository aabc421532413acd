"""Medusa's heads for training (Cai et al., arXiv 2401.10774), with the tensor names of the published format."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import linear, silu

from eagleray.models.draft_heads.draft_config import MedusaConfig
from eagleray.training.lesson import Lesson
from eagleray.training.trainee import parameters_from


class MedusaTrainee:
    """Implements ``Trainee``. ``weights``: to start from, by name; see ``weight_names.medusa_views``."""

    def __init__(self, config: MedusaConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.num_guesses = config.num_heads
        self.weights = parameters_from(weights)
        self.output_layers = frozenset(f"{head}.{config.num_layers}.weight" for head in range(config.num_heads))

    def guess(self, lesson: Lesson) -> Iterator[Tensor]:
        """Logits [R, V] for the chains of depths 1, 2, ...: one head each."""
        for head in range(self.config.num_heads):
            hidden_RC = lesson.features_BTC[lesson.chains(head + 1)]
            for block in range(self.config.num_layers):
                weight, bias = (self.weights[f"{head}.{block}.linear.{part}"] for part in ("weight", "bias"))
                hidden_RC = hidden_RC + silu(linear(hidden_RC, weight, bias))
            yield linear(hidden_RC, self.weights[f"{head}.{self.config.num_layers}.weight"])
