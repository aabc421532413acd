"""Steps of few rows are recorded as calls of the native library, and made again by one call from Python."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Hashable
from enum import Enum, auto

import torch
from torch import Tensor

from eagleray.kernels.native.library import NativeLibrary, address
from eagleray.kernels.replay.api import StepInputs
from eagleray.kernels.replay.arena import MAX_PROGRAMS, MAX_ROWS
from eagleray.kernels.replay.recording import Output, Program, record

_Result = tuple[Tensor, ...]


class _NoProgram(Enum):
    SEEN_ONCE = auto()
    IMPOSSIBLE = auto()


class NativeReplayer:
    """Implements ``Replayer``; used by one thread at a time.

    A step is recorded when its shapes come for the second time: many do not. What it returned is copied out of the
    memory that all programs share.
    """

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        # By variant and shapes, the longest unused first. A step that could not be recorded is not tried again, but
        # says nothing of other shapes.
        self._programs: OrderedDict[Hashable, Program | _NoProgram] = OrderedDict()
        self._arena = torch.empty(0, dtype=torch.uint8)

    def run(self, compute: Callable[[], _Result], inputs: StepInputs, variant: Hashable) -> _Result:
        """See ``Replayer.run``. What is wrong with inputs is found by ``compute``."""
        if self._library.tape.calls is not None:  # a part of a larger step that is recorded
            return compute()
        first = inputs.fixed[0]
        if first is None or len(first) > MAX_ROWS:
            return compute()
        forms = tuple(None if tensor is None else _form(tensor) for tensor in inputs.fixed)
        key = (variant, forms, tuple((tensor.dtype, tensor.stride()) for tensor in inputs.ragged), _aliases(inputs))
        if key not in self._programs:
            self._remember(key, _NoProgram.SEEN_ONCE)
            return compute()
        self._programs.move_to_end(key)
        program = self._programs[key]
        if program is _NoProgram.IMPOSSIBLE:
            return compute()
        if program is _NoProgram.SEEN_ONCE:
            outputs, recorded = record(self._library, compute, inputs)
            self._remember(key, recorded or _NoProgram.IMPOSSIBLE)
            return outputs
        replayed = self._replay(program, inputs)
        return compute() if replayed is None else replayed

    def _remember(self, key: Hashable, program: Program | _NoProgram) -> None:
        self._programs[key] = program
        while len(self._programs) > MAX_PROGRAMS:
            self._programs.popitem(last=False)

    def _replay(self, program: Program, inputs: StepInputs) -> _Result | None:
        """None if a call failed."""
        if len(self._arena) < program.arena_bytes:
            self._arena = torch.empty(program.arena_bytes, dtype=torch.uint8)
        tensors = (self._arena, *inputs.fixed, *inputs.ragged)
        failed = self._library.run_program(
            *(program.calls.data_ptr(), len(program.calls), program.patches.data_ptr(), len(program.patches)),
            (ctypes.c_void_p * len(tensors))(*map(address, tensors)),
        )
        return None if failed else tuple(_copied(output, tensors[output.input_index]) for output in program.outputs)


def _aliases(inputs: StepInputs) -> tuple[int, ...]:
    """Which inputs are the same memory: of what a recorded call read there, nobody could tell which input was meant."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*inputs.fixed, *inputs.ragged)]
    return tuple(map(addresses.index, addresses))


def _form(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype


def _copied(output: Output, tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    elements = tensor.view(output.dtype)
    offset = elements.storage_offset() + output.offset // elements.element_size()
    return torch.as_strided(elements, output.shape, output.stride, offset).clone()
