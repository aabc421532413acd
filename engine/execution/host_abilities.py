"""What a host can do for its workers, as far as their memory depends on it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from eagleray.core.config import EngineConfig
from eagleray.kernels.cache_folder import CacheFolderUnknown, kernel_folder
from eagleray.kernels.native.build import can_be_built
from eagleray.models.packed_folder import PackedFolder, packed_weights_folder

_NATIVE_DTYPES: Final = ("float32", "bfloat16")
_FILE_SHARE: Final = 1.05  # of the weights' bytes: with scales, padding and an index


@dataclass(frozen=True, slots=True)
class HostAbilities:
    """Everything, unless it was looked at (``read_host_abilities``)."""

    has_native_kernels: bool = True
    packed_room_bytes: int = 2**62  # of the disk, for packed weights
    packed_sizes_bytes: tuple[int, ...] = ()  # of files that are there already

    def computes_natively(self, engine: EngineConfig, dtype: str) -> bool:
        if engine.kernels == "auto":
            return self.has_native_kernels and dtype in _NATIVE_DTYPES
        return engine.kernels == "native"

    def can_keep(self, num_bytes: int, limit_bytes: int) -> bool:
        """Whether a file can have so many bytes of packed weights, for all workers. One that is there and about as
        large is taken for theirs."""
        if not limit_bytes:
            return False
        largest_bytes = int(num_bytes * _FILE_SHARE)
        return largest_bytes <= min(limit_bytes, self.packed_room_bytes) or any(
            num_bytes <= size <= largest_bytes for size in self.packed_sizes_bytes
        )


ABLE_HOST: Final = HostAbilities()


def read_host_abilities() -> HostAbilities:
    """Of this host, now."""
    try:
        kernels, folder = kernel_folder(), PackedFolder(packed_weights_folder())
    except CacheFolderUnknown:  # nothing is kept for the next start
        return HostAbilities(has_native_kernels=False, packed_room_bytes=0)
    return HostAbilities(can_be_built(kernels), folder.disk_room_bytes(), folder.file_sizes_bytes())
