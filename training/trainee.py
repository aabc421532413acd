"""What can be trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from eagleray.training.lesson import Lesson


class Trainee(Protocol):
    """A draft head in differentiable form; all of them are modules of torch."""

    num_guesses: int

    def guess(self, lesson: Lesson) -> Iterator[Tensor]:
        """Logits [R, V] of the chains of depths 1 to ``num_guesses``, in the order of ``lesson.chains``."""
        ...

    def named_tensors(self) -> dict[str, Tensor]:
        """All parameters by the names of the published format."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...
