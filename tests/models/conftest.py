from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def parameters_of() -> Callable[[object], Iterator[torch.nn.Parameter]]:
    """Every parameter that a model or one of its parts holds; a shared one as often as it is held."""
    return _parameters


def _parameters(part: object) -> Iterator[torch.nn.Parameter]:
    for held in vars(part).values():
        for value in held if isinstance(held, list) else [held]:
            if isinstance(value, torch.nn.Parameter):
                yield value
            elif type(value).__module__.startswith("eagleray.models.") and hasattr(value, "__dict__"):
                yield from _parameters(value)
