"""Steps of few rows are recorded as calls of the native library, and made again by one call from Python."""

from __future__ import annotations

import ctypes
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from enum import Enum, auto
from itertools import accumulate

import torch
from torch import Tensor

from eagleray.kernels.native.library import NativeLibrary, address
from eagleray.kernels.replay.api import StepInputs, StepIntegers
from eagleray.kernels.replay.arena import MAX_PROGRAMS, MAX_ROWS, aligned
from eagleray.kernels.replay.recording import Output, Program, record

_Result = tuple[Tensor, ...]


class _NoProgram(Enum):
    SEEN_ONCE = auto()
    IMPOSSIBLE = auto()


class NativeReplayer:
    """Implements ``Replayer``; used by one thread at a time.

    A step is recorded when its shapes come for the second time: many do not. What it returns is written where it is to
    stay, in memory that was there before if nobody keeps it: after a step each operation of torch takes some 20 us, as
    the caches are empty.
    """

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        # By variant and shapes, the longest unused first. A step that could not be recorded is not tried again, but
        # says nothing of other shapes.
        self._programs: OrderedDict[Hashable, Program | _NoProgram] = OrderedDict()
        self._arena = _no_memory()
        self._results = _no_memory()  # of all programs, where nobody keeps them

    def run(self, compute: Callable[[], _Result], inputs: StepInputs, variant: Hashable, keep: bool = True) -> _Result:
        """See ``Replayer.run``. What is wrong with inputs is found by ``compute``."""
        if self._library.tape.calls is not None:  # a part of a larger step that is recorded
            return compute()
        num_rows = inputs.num_rows
        if num_rows is None or num_rows > MAX_ROWS:
            return compute()
        addresses = [address(tensor) for tensor in (*inputs.fixed, *inputs.ragged)]
        key = (variant, *_forms(inputs), _aliases(addresses))
        if key not in self._programs:
            self._remember(key, _NoProgram.SEEN_ONCE)
            with self._library.tape.recording():  # for nobody: replayers of its parts shall not begin to record them
                return compute()
        self._programs.move_to_end(key)
        program = self._programs[key]
        if program is _NoProgram.IMPOSSIBLE:
            return compute()
        if program is _NoProgram.SEEN_ONCE:
            outputs, recorded = record(self._library, compute, inputs)
            self._remember(key, recorded or _NoProgram.IMPOSSIBLE)
            return outputs
        addresses.append(None if inputs.integers is None else inputs.integers.address)
        replayed = self._replay(program, inputs, addresses, keep)
        return compute() if replayed is None else replayed

    def _remember(self, key: Hashable, program: Program | _NoProgram) -> None:
        self._programs[key] = program
        while len(self._programs) > MAX_PROGRAMS:
            self._programs.popitem(last=False)

    def _replay(self, program: Program, inputs: StepInputs, addresses: list[int | None], keep: bool) -> _Result | None:
        """None if a call failed."""
        if len(self._arena) < program.arena_bytes:
            self._arena = torch.empty(program.arena_bytes, dtype=torch.uint8)
        if keep:
            results = [torch.empty(shape, dtype=dtype) for shape, dtype in program.results]
        else:
            results = self._shared_results(program)
        places = (self._arena.data_ptr(), *addresses, *(result.data_ptr() for result in results))
        failed = self._library.run_program(
            *(program.calls.data_ptr(), len(program.calls), program.patches.data_ptr(), len(program.patches)),
            (ctypes.c_void_p * len(places))(*places),
        )
        if failed:
            return None
        sources = (self._arena, *inputs.fixed, *inputs.ragged, inputs.integers, *results)
        return tuple(_result(output, sources[output.input_index]) for output in program.outputs)

    def _shared_results(self, program: Program) -> list[Tensor]:
        """Where those of every program lie, and the next one overwrites them."""
        if not program.shared_results:
            sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in program.results]
            starts = list(accumulate(map(aligned, sizes), initial=0))
            if len(self._results) < starts[-1]:
                self._results = torch.empty(starts[-1], dtype=torch.uint8)
                for other in self._programs.values():
                    if isinstance(other, Program):
                        other.shared_results.clear()
            for (shape, dtype), start, size in zip(program.results, starts, sizes, strict=False):
                program.shared_results.append(self._results[start : start + size].view(dtype).view(shape))
        return program.shared_results


def _no_memory() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _forms(inputs: StepInputs) -> tuple[Hashable, ...]:
    """Of what a step's calls depend on."""
    fixed = tuple(None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs.fixed)
    ragged = tuple((tensor.dtype, tensor.stride()) for tensor in inputs.ragged)
    return fixed, ragged, None if inputs.integers is None else inputs.integers.lengths[:-1]


def _aliases(addresses: list[int | None]) -> tuple[int, ...]:
    """Which inputs are the same memory: of what a recorded call read there, nobody could tell which input was meant."""
    return tuple(map(addresses.index, addresses))


def _result(output: Output, source: Tensor | StepIntegers | None) -> Tensor:
    assert source is not None
    tensor = source.tensors[0] if isinstance(source, StepIntegers) else source
    return tensor if output.part is None else output.part.of(tensor)
