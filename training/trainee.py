"""What can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from eagleray.training.lesson import Lesson


class Trainee(Protocol):
    """A draft head in differentiable form."""

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """All of them, by the names of the published format (``layers.0`` for ``midlayer``)."""
        ...

    @property
    def output_layers(self) -> frozenset[str]:
        """Names of the weights that have a row for each word."""
        ...

    @property
    def num_guesses(self) -> int:
        """Depth of its chains."""
        ...

    def guess(self, lesson: Lesson) -> Iterator[Tensor]:
        """Logits [R, V] of the chains of depths 1 to ``num_guesses``, in the order of ``lesson.chains``."""
        ...


def parameters_from(weights: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Float32 copies that can be trained."""
    return {name: nn.Parameter(weight.detach().float().clone()) for name, weight in weights.items()}
