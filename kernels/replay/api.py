"""Computing the same sequence of operations at every step without going through Python for each of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor


class StepIntegers:
    """Vectors of int64 that a step computes by, in one piece of memory. Tensors are made of them when somebody asks: a
    replayed step needs none, and to make one takes some 20 us where another step has just emptied the caches."""

    def __init__(self, device: torch.device | str, *vectors: Sequence[int]) -> None:
        self.lengths = tuple(map(len, vectors))
        self._values = array("q", chain.from_iterable(vectors))
        self._device = device

    @property
    def address(self) -> int:
        return self._values.buffer_info()[0]

    @property
    def num_bytes(self) -> int:
        return len(self._values) * self._values.itemsize

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """One for each vector, parts of the same memory."""
        return torch.split(torch.frombuffer(self._values, dtype=torch.int64).to(self._device), list(self.lengths))


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that differs from step to step."""

    fixed: tuple[Tensor | None, ...] = ()  # what is done depends on their shapes
    ragged: tuple[Tensor, ...] = ()  # and does not on the lengths of these, of one dimension
    integers: StepIntegers | None = None  # nor on the length of the last of these vectors

    @property
    def num_rows(self) -> int | None:
        """Of the step, where its first input has one for each."""
        if self.integers is not None:
            return self.integers.lengths[0]
        return None if self.fixed[0] is None else len(self.fixed[0])

    @property
    def places(self) -> list[tuple[int, int] | None]:
        """(Address, bytes from there on) of each of them, the integers last; None for what there is not."""
        integers = self.integers
        return [
            *(None if each is None else (each.data_ptr(), num_bytes_behind(each)) for each in self.fixed),
            *((each.data_ptr(), num_bytes_behind(each)) for each in self.ragged),
            None if integers is None else (integers.address, integers.num_bytes),
        ]


def num_bytes_behind(tensor: Tensor) -> int:
    """Of its memory, from its first element on."""
    return int(tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size())


class Replayer(Protocol):
    """Runs the steps of one network."""

    def run(
        self, compute: Callable[[], tuple[Tensor, ...]], inputs: StepInputs, variant: Hashable, keep: bool = True
    ) -> tuple[Tensor, ...]:
        """What ``compute()`` returns. Without ``keep`` the next step may overwrite it.

        It may have been recorded at an earlier step with an equal ``variant`` and inputs of the same shapes. So
        ``variant`` tells apart whatever else can differ, and all other tensors that it reads or writes stay where they
        are.
        """
        ...


class ComputeAnew:
    """Implements ``Replayer`` without recording anything."""

    def run(
        self, compute: Callable[[], tuple[Tensor, ...]], inputs: StepInputs, variant: Hashable, keep: bool = True
    ) -> tuple[Tensor, ...]:
        return compute()
