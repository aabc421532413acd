"""The KV pool as tensors: one buffer, on the host or on the device, with a tensor per group of the layout."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from eagleray.core.errors import ConfigError
from eagleray.core.kv_layout import KVLayout
from eagleray.core.kv_region import SharedMemoryRef
from eagleray.engine.execution.kv_memory import KVMemory, check_fits, group_offsets

TORCH_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVTensors:
    """``num_blocks`` blocks of ``layout``, zero-filled.

    Raises ``ConfigError`` when they do not fit into the memory that is free.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: str = "cpu", shared: bool = False) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.group_offsets = group_offsets(layout, num_blocks)
        self._memory = KVMemory(layout, num_blocks, shared) if device == "cpu" else None
        if self._memory is not None:
            buffer = torch.frombuffer(self._memory.buffer, dtype=torch.uint8)
        else:
            buffer = _allocate_on_device(self.group_offsets[0] + num_blocks * layout.block_bytes, device)
        self._groups = {
            group.name: _view_group(
                buffer, offset, (num_blocks, *group.block_shape(layout.block_size_tokens)), group.dtype
            )
            for group, offset in zip(layout.groups, self.group_offsets, strict=True)
        }

    def group(self, name: str) -> Tensor:
        """[num_blocks, layer, key or value, kv_head, token in block, head_dim] of a layer group, [num_blocks, width] of
        a feature group."""
        return self._groups[name]

    def block_views(self, block_id: int) -> list[memoryview]:
        """The writable bytes of one block in host memory, one view per layer group; nothing is copied."""
        if self._memory is None:
            raise ConfigError("device", "cuda", "blocks in device memory have no bytes on the host to view")
        return self._memory.block_views(block_id)

    def shared_memory_ref(self) -> SharedMemoryRef | None:
        """How another process of this host finds the pool; None when it is private, closed or on a device."""
        return self._memory.shared_memory_ref() if self._memory is not None else None

    def close(self) -> None:
        """Offer the pool to no new reader; its memory goes with the last tensor and view of it."""
        self._groups = {}
        if self._memory is not None:
            self._memory.close()


def _allocate_on_device(num_bytes: int, device: str) -> Tensor:
    check_fits(num_bytes, torch.cuda.mem_get_info(device)[0])
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def _view_group(buffer: Tensor, offset: int, shape: tuple[int, ...], dtype_name: str) -> Tensor:
    dtype = TORCH_DTYPES[dtype_name]
    num_bytes = math.prod(shape) * dtype.itemsize
    return buffer[offset : offset + num_bytes].view(dtype).view(shape)
