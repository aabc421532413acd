"""Medusa's heads for training (Cai et al., arXiv 2401.10774), with the tensor names of the published format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.functional import linear, silu

from eagleray.models.draft_heads.draft_config import MedusaConfig
from eagleray.training.lesson import Lesson


class MedusaTrainee(nn.Module):
    """Implements ``Trainee``. ``weights``: to start from, by name; see ``weight_names.medusa_views``."""

    def __init__(self, config: MedusaConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.num_guesses = config.num_heads
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(weight.float().clone()) for name, weight in weights.items()}
        )

    def named_tensors(self) -> dict[str, Tensor]:
        """All parameters by their stored names."""
        return {name.replace("/", "."): weight.detach() for name, weight in self.weights.items()}

    def guess(self, lesson: Lesson) -> Iterator[Tensor]:
        """Logits [R, V] for the chains of depths 1, 2, ...: one head each."""
        for head in range(self.config.num_heads):
            hidden_RC = lesson.features_BTC[lesson.chains(head + 1)]
            for block in range(self.config.num_layers):
                name = f"{head}/{block}/linear"
                hidden_RC = hidden_RC + silu(linear(hidden_RC, self.weights[f"{name}/weight"], self.weights[f"{name}/bias"]))
            yield linear(hidden_RC, self.weights[f"{head}/{self.config.num_layers}/weight"])
