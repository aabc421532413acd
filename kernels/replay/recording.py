"""Recording a step: which native functions it called, with which arguments, and what the addresses among them mean."""

from __future__ import annotations

import ctypes
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from eagleray.kernels.native.library import MAX_ARGUMENTS, NativeCall, NativeLibrary
from eagleray.kernels.replay.api import StepInputs
from eagleray.kernels.replay.arena import Lifetime, place

_ALLOCATIONS: Final = {"empty", "new_empty"}
_VIEWS: Final = {"view", "reshape", "contiguous", "__getitem__", "unbind", "split", "chunk", "unsqueeze", "squeeze"}
_QUESTIONS: Final = {
    "__get__",
    "__len__",
    "size",
    "stride",
    "is_contiguous",
    "data_ptr",
    "element_size",
    "numel",
    "dim",
}
ARENA: Final = 0  # index among a program's inputs; the step's own follow


class _TorchWatch(TorchFunctionMode):
    """Sees what is asked of torch: where it allocates, and whether it computes, which could not be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []  # kept, so that no address is given out twice
        self.computed = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _ALLOCATIONS:
            self.allocated.append(result)
        elif name not in _QUESTIONS and not (name in _VIEWS and _is_view(result, args[0])):
            self.computed = True
        return result


def _is_view(result: Tensor | tuple[Tensor, ...], base: Tensor) -> bool:
    """Or several. Some functions copy where they cannot give a view."""
    views = result if isinstance(result, tuple) else (result,)
    return all(_same_memory(view, base) for view in views)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@dataclass(frozen=True, slots=True)
class Region:
    """Memory whose place may differ from run to run: the arena for intermediate results, or an input."""

    address: int  # when recorded
    num_bytes: int
    input_index: int
    offset: int  # in that input


class Regions:
    """Finds the region of an address."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self._regions = sorted((region for region in regions if region.num_bytes), key=lambda region: region.address)
        self._addresses = [region.address for region in self._regions]

    def find(self, address: int) -> Region | None:
        index = bisect_right(self._addresses, address) - 1
        if index < 0:
            return None
        region = self._regions[index]
        return region if address < region.address + region.num_bytes else None


@dataclass(frozen=True, slots=True)
class Output:
    """Where a result of the step lies."""

    input_index: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Program:
    """A step that can be replayed."""

    calls: Tensor  # int64 [calls, 1 + MAX_ARGUMENTS]: struct call of program.c
    patches: Tensor  # int64 [patches, 4]: struct patch
    outputs: tuple[Output, ...]
    arena_bytes: int


def record(
    library: NativeLibrary, compute: Callable[[], tuple[Tensor, ...]], inputs: StepInputs
) -> tuple[tuple[Tensor, ...], Program | None]:
    """(What ``compute()`` returns, the program that does the same). None: something besides native functions computes,
    or a result is neither made by them nor an input."""
    with library.tape.recording() as calls, _TorchWatch() as watch:
        outputs = compute()
    if watch.computed or any(call.function.replay_address is None for call in calls):
        return outputs, None
    return outputs, _build(calls, watch.allocated, inputs, outputs)


def _build(
    calls: Sequence[NativeCall], allocated: Sequence[Tensor], inputs: StepInputs, outputs: Sequence[Tensor]
) -> Program | None:
    given = [
        Region(tensor.data_ptr(), _num_bytes(tensor), index, 0)
        for index, tensor in enumerate((*inputs.fixed, *inputs.ragged), start=ARENA + 1)
        if tensor is not None
    ]
    results, arena_bytes = _place(calls, allocated, outputs)
    regions = Regions([*given, *results])
    places = [_output(tensor, regions.find(tensor.data_ptr())) for tensor in outputs]
    if None in places:
        return None
    words, patches = [], []
    for number, call in enumerate(calls):
        arguments = list(map(_word, call.function.argument_types, call.arguments))
        for index, address in _addresses(call):
            region = regions.find(address)
            if region is not None:
                patches.append((number, index, region.input_index, region.offset + address - region.address))
        words.append([call.function.replay_address, *arguments, *[0] * (MAX_ARGUMENTS - len(arguments))])
    return Program(
        torch.tensor(words, dtype=torch.int64).view(-1, 1 + MAX_ARGUMENTS),
        torch.tensor(patches, dtype=torch.int64).view(-1, 4),
        tuple(filter(None, places)),
        arena_bytes,
    )


def _place(
    calls: Sequence[NativeCall], allocated: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[list[Region], int]:
    """Regions of the arena for what the step allocated, and its size."""
    found = Regions(Region(tensor.data_ptr(), _num_bytes(tensor), index, 0) for index, tensor in enumerate(allocated))
    uses: dict[int, list[int]] = {}
    for number, call in enumerate(calls):
        for _, address in _addresses(call):
            region = found.find(address)
            if region is not None:
                uses.setdefault(region.input_index, []).append(number)
    for tensor in outputs:  # are read when all is done
        region = found.find(tensor.data_ptr())
        if region is not None:
            uses.setdefault(region.input_index, []).append(len(calls))
    used = list(uses)
    lifetimes = [Lifetime(_num_bytes(allocated[index]), min(uses[index]), max(uses[index])) for index in used]
    offsets, size = place(lifetimes)
    regions = [
        Region(allocated[index].data_ptr(), life.num_bytes, ARENA, offset)
        for index, life, offset in zip(used, lifetimes, offsets, strict=True)
    ]
    return regions, size


def _num_bytes(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size())


def _addresses(call: NativeCall) -> list[tuple[int, int]]:
    """(index, value) of the arguments that are addresses."""
    pairs = zip(call.function.argument_types, call.arguments, strict=True)
    return [(index, value) for index, (kind, value) in enumerate(pairs) if kind is ctypes.c_void_p and value]


def _word(kind: type[Any], value: float | None) -> int:
    """As union argument of program.c."""
    if kind is ctypes.c_float:
        return int(struct.unpack("q", struct.pack("d", value))[0])
    return 0 if value is None else int(value)


def _output(tensor: Tensor, region: Region | None) -> Output | None:
    if region is None:
        return None
    offset = region.offset + tensor.data_ptr() - region.address
    return Output(region.input_index, offset, tensor.shape, tensor.stride(), tensor.dtype)
