"""Recording a step: which native functions it called, with which arguments, and what the addresses among them mean."""

from __future__ import annotations

import ctypes
import struct
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from eagleray.kernels.native.library import MAX_ARGUMENTS, NativeCall, NativeLibrary
from eagleray.kernels.replay.api import StepInputs, num_bytes_behind
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


@dataclass(frozen=True, slots=True)
class Region:
    """Memory whose place may differ from run to run: an input of the step, or what it allocated for a result."""

    address: int  # when recorded
    num_bytes: int
    number: int  # of the input, or of the allocation
    before_call: int | None = None  # an allocation: how many calls had been made; None: an input

    def contains(self, address: int) -> bool:
        return self.address <= address < self.address + self.num_bytes


class _TorchWatch(TorchFunctionMode):
    """Sees what is asked of torch: where it allocates, and whether it computes, which could not be replayed."""

    def __init__(self, calls: Sequence[NativeCall]) -> None:
        super().__init__()
        # Their memory is not kept: the results of all layers would be alive at one time. So an address may be given out
        # again, and which allocation it means depends on the call.
        self.allocated: list[Region] = []
        self.computed = False
        self._calls = calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _ALLOCATIONS:
            number, before_call = len(self.allocated), len(self._calls)
            self.allocated.append(Region(result.data_ptr(), num_bytes_behind(result), number, before_call))
        elif name not in _QUESTIONS and not (name in _VIEWS and _is_view(result, args[0])):
            self.computed = True
        return result


def _is_view(result: Tensor | tuple[Tensor, ...], base: Tensor) -> bool:
    """Or several. Some functions copy where they cannot give a view."""
    views = result if isinstance(result, tuple) else (result,)
    return all(_same_memory(view, base) for view in views)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Memory:
    """What lies where at one moment of the step."""

    def __init__(self, inputs: Iterable[Region]) -> None:
        # Two inputs may be parts of one tensor: then the one that begins last before an address is meant.
        self._inputs = _ByAddress(sorted(inputs, key=lambda region: region.address))
        self._allocated = _ByAddress([])

    def allocate(self, new: Region) -> None:
        """What was there before had been given back."""
        self._allocated.replace_by(new)

    def find(self, address: int) -> Region | None:
        return self._allocated.find(address) or self._inputs.find(address)


class _ByAddress:
    """Regions in the order of their addresses."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self._regions = [region for region in regions if region.num_bytes]
        self._addresses = [region.address for region in self._regions]

    def find(self, address: int) -> Region | None:
        index = bisect_right(self._addresses, address) - 1
        return self._regions[index] if index >= 0 and self._regions[index].contains(address) else None

    def replace_by(self, new: Region) -> None:
        """``new`` for all that it overlaps. Those here do not overlap each other."""
        if not new.num_bytes:
            return
        first = bisect_right(self._addresses, new.address)
        if first and self._regions[first - 1].contains(new.address):
            first -= 1
        end = bisect_left(self._addresses, new.address + new.num_bytes)
        self._regions[first:end] = [new]
        self._addresses[first:end] = [new.address]


@dataclass(frozen=True, slots=True)
class Part:
    """Of a tensor with elements of ``dtype``, from its first byte on."""

    offset_bytes: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, tensor: Tensor) -> Tensor:
        elements = tensor.view(self.dtype)
        offset = elements.storage_offset() + self.offset_bytes // elements.element_size()
        return torch.as_strided(elements, self.shape, self.stride, offset)


@dataclass(frozen=True, slots=True)
class Output:
    """Where a result of the step lies."""

    input_index: int
    part: Part | None  # None: all of it


@dataclass(frozen=True, slots=True)
class Program:
    """A step that can be replayed. Its inputs are the arena, those of ``StepInputs`` and its results."""

    calls: Tensor  # int64 [calls, 1 + MAX_ARGUMENTS]: struct call of program.c
    patches: Tensor  # int64 [patches, 4]: struct patch
    results: tuple[tuple[torch.Size, torch.dtype], ...]  # tensors that it writes
    outputs: tuple[Output, ...]
    arena_bytes: int
    shared_results: list[Tensor] = field(default_factory=list)  # once it has been run for one that does not keep them


def record(
    library: NativeLibrary, compute: Callable[[], tuple[Tensor, ...]], inputs: StepInputs
) -> tuple[tuple[Tensor, ...], Program | None]:
    """(What ``compute()`` returns, the program that does the same). None: something besides native functions computes,
    or a result is neither made by them nor an input."""
    if inputs.integers is not None:
        _ = inputs.integers.tensors  # made before the watch begins
    with library.tape.recording() as calls, _TorchWatch(calls) as watch:
        outputs = compute()
    if watch.computed or any(call.function.replay_address is None for call in calls):
        return outputs, None
    return outputs, _build(calls, watch.allocated, inputs, outputs)


@dataclass(frozen=True, slots=True)
class _Use:
    """An address within a region."""

    region: Region
    offset: int
    call: int  # that has it as an argument; the number of calls: it is a result of the step
    argument: int = 0


def _build(
    calls: Sequence[NativeCall], allocated: Sequence[Region], inputs: StepInputs, outputs: Sequence[Tensor]
) -> Program | None:
    places = inputs.places
    regions = [Region(*place, index) for index, place in enumerate(places, start=ARENA + 1) if place is not None]
    uses, found = _find_uses(calls, allocated, Memory(regions), outputs)
    if len(found) < len(outputs):
        return None
    results = _Results(first_index=ARENA + 1 + len(places))
    placed = [results.add(use, tensor) for use, tensor in zip(found, outputs, strict=True)]
    offsets, arena_bytes = _place([use for use in uses if use.region.number not in results.of_allocation])

    def located(use: _Use) -> tuple[int, int]:
        """(Index among the program's inputs, offset there)."""
        region = use.region
        if region.before_call is None:
            return region.number, use.offset
        if region.number in results.of_allocation:
            return results.of_allocation[region.number], use.offset
        return ARENA, offsets[region.number] + use.offset

    words = [_words(call) for call in calls]
    patches = [(use.call, use.argument, *located(use)) for use in uses]
    return Program(
        torch.tensor(words, dtype=torch.int64).view(-1, 1 + MAX_ARGUMENTS),
        torch.tensor(patches, dtype=torch.int64).view(-1, 4),
        tuple(results.forms),
        tuple(placed),
        arena_bytes,
    )


@dataclass(slots=True)
class _Results:
    """Allocations that results lie in. They are no part of the arena, which the next step overwrites."""

    first_index: int  # among the program's inputs
    of_allocation: dict[int, int] = field(default_factory=dict)  # by its number: the index among the program's inputs
    forms: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)

    def add(self, use: _Use, tensor: Tensor) -> Output:
        region = use.region
        part = Part(use.offset, tensor.shape, tensor.stride(), tensor.dtype)
        if region.before_call is None:
            return Output(region.number, part)
        is_whole = tensor.is_contiguous() and tensor.nbytes == region.num_bytes
        if region.number not in self.of_allocation:
            self.of_allocation[region.number] = self.first_index + len(self.forms)
            shape = tensor.shape if is_whole else torch.Size((region.num_bytes // tensor.element_size(),))
            self.forms.append((shape, tensor.dtype))
        index = self.of_allocation[region.number]
        form = self.forms[index - self.first_index]
        return Output(index, None if is_whole and form == (tensor.shape, tensor.dtype) else part)


def _find_uses(
    calls: Sequence[NativeCall], allocated: Sequence[Region], memory: Memory, outputs: Sequence[Tensor]
) -> tuple[list[_Use], list[_Use]]:
    """(Of regions by the calls, by those outputs that lie in one.)"""
    uses: list[_Use] = []
    coming = deque(allocated)

    def allocate_before(number: int) -> None:
        while coming and coming[0].before_call is not None and coming[0].before_call <= number:
            memory.allocate(coming.popleft())

    for number, call in enumerate(calls):
        allocate_before(number)
        for index, address in _addresses(call):
            region = memory.find(address)
            if region is not None:
                uses.append(_Use(region, address - region.address, number, index))
    allocate_before(len(calls))
    found = [(memory.find(tensor.data_ptr()), tensor.data_ptr()) for tensor in outputs]
    results = [_Use(region, address - region.address, len(calls)) for region, address in found if region is not None]
    return uses, results


def _place(uses: Sequence[_Use]) -> tuple[dict[int, int], int]:
    """Offsets in the arena of what the step allocated and used, by number of the allocation; and its size."""
    spans: dict[int, Lifetime] = {}
    for use in uses:  # in the order of the calls
        if use.region.before_call is not None:
            first = spans[use.region.number].first if use.region.number in spans else use.call
            spans[use.region.number] = Lifetime(use.region.num_bytes, first, use.call)
    offsets, size = place(list(spans.values()))
    return dict(zip(spans, offsets, strict=True)), size


def _addresses(call: NativeCall) -> list[tuple[int, int]]:
    """(index, value) of the arguments that are addresses."""
    pairs = zip(call.function.argument_types, call.arguments, strict=True)
    return [(index, value) for index, (kind, value) in enumerate(pairs) if kind is ctypes.c_void_p and value]


def _words(call: NativeCall) -> list[int]:
    """As struct call of program.c."""
    arguments = list(map(_word, call.function.argument_types, call.arguments))
    return [call.function.replay_address or 0, *arguments, *[0] * (MAX_ARGUMENTS - len(arguments))]


def _word(kind: type[Any], value: float | None) -> int:
    """As union argument of program.c."""
    if kind is ctypes.c_float:
        return int(struct.unpack("q", struct.pack("d", value))[0])
    return 0 if value is None else int(value)
