"""Computing the same sequence of operations at every step without going through Python for each of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All tensors that differ from step to step."""

    fixed: tuple[Tensor | None, ...]  # what is done depends on their shapes
    ragged: tuple[Tensor, ...]  # and does not on the lengths of these, of one dimension


class Replayer(Protocol):
    """Runs the steps of one network."""

    def run(
        self, compute: Callable[[], tuple[Tensor, ...]], inputs: StepInputs, variant: Hashable
    ) -> tuple[Tensor, ...]:
        """What ``compute()`` returns.

        It may have been recorded at an earlier step with an equal ``variant`` and inputs of the same shapes. So
        ``variant`` tells apart whatever else can differ, and all other tensors that it reads or writes stay where they
        are.
        """
        ...


class ComputeAnew:
    """Implements ``Replayer`` without recording anything."""

    def run(
        self, compute: Callable[[], tuple[Tensor, ...]], inputs: StepInputs, variant: Hashable
    ) -> tuple[Tensor, ...]:
        return compute()
