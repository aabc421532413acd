"""Packed weights in files that every process of the host maps: one copy in memory, and no packing at the next start.

A file is the tensors, each aligned, then an index, then a footer. It is written under a temporary name and renamed when
it is whole. Every tensor and the index carry a fingerprint, because a machine that loses power may keep the new name
and lose the bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import xxhash

from eagleray.core.clock import Clock
from eagleray.kernels.linear.api import PackedLinear
from eagleray.models.file_lock import locked
from eagleray.models.mapped_file import map_for_reading
from eagleray.models.packed_folder import PARTIAL_SUFFIX, SUFFIX, PackedFolder, is_same_file

_MAGIC: Final = b"eagleray packed weights 2\n"
_FOOTER_BYTES: Final = 8 + 8 + len(_MAGIC)  # length of the index, its fingerprint, magic
_ALIGNMENT_BYTES: Final = 4096
_PACKING_DEADLINE_S: Final = 300.0  # of another process

_logger: Final = logging.getLogger(__name__)

Pack = Callable[[], Iterable[tuple[str, PackedLinear]]]


class PackedWeightsUnavailable(Exception):
    """Packed weights cannot be kept in a file, for the reason in the message."""


class _Tensor(msgspec.Struct, frozen=True):
    offset: int
    dtype: str
    shape: tuple[int, ...]
    fingerprint: int


class _Linear(msgspec.Struct, frozen=True):
    name: str
    out_features: int
    in_features: int
    tensors: dict[str, _Tensor]


class PackedWeightFiles:
    """The files of one folder, of which those used longest ago go when there are more than ``limit_bytes`` in all.

    Args:
        folder: made when it is needed.
        model: names the content that is packed: equal names, equal weights.
        limit_bytes: of disk.
        clock: for the waits while another process packs or maps the same.
    """

    def __init__(self, folder: Path, model: str, limit_bytes: int, clock: Clock) -> None:
        self._folder = PackedFolder(folder)
        self._model = model
        self._limit_bytes = limit_bytes
        self._clock = clock

    def get(self, layout: str, pack: Pack) -> Mapping[str, PackedLinear]:
        """The packed linear layers by name, mapped read-only. ``pack`` is called when no file has them yet; when
        several processes ask at once, in one of them.

        Raises ``PackedWeightsUnavailable``: no room, or a folder that cannot be used.
        """
        key = blake2b(f"{self._model}\n{layout}".encode(), digest_size=16).hexdigest()
        path = self._folder.path / f"{key}{SUFFIX}"
        try:
            self._folder.remove_abandoned()
            found = _map_if_whole(path, self._clock)
            if found is None:
                self._folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._write(path, pack)
                found = _map_if_whole(path, self._clock)
            with contextlib.suppress(OSError):  # another process evicted it, or another user owns it: it is mapped
                os.utime(path)  # what was used last goes last
        except OSError as error:
            raise PackedWeightsUnavailable(f"{self._folder.path}: {error.strerror or error}") from None
        if found is None:
            raise PackedWeightsUnavailable(f"{path} was written and cannot be read back")
        return found

    def _write(self, path: Path, pack: Pack) -> None:
        """Returns when the file is there, whoever wrote it."""
        partial = path.with_suffix(PARTIAL_SUFFIX)
        with _partial_file(partial, self._clock) as file:
            if _map_if_whole(path, self._clock) is not None:  # another process wrote it while we waited
                partial.unlink(missing_ok=True)
                return
            try:
                self._write_whole(file, pack)
                num_bytes = file.tell()
                partial.rename(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        _logger.info("packed weights written to %s (%d bytes)", path, num_bytes)
        self._folder.evict(path, self._limit_bytes)

    def _write_whole(self, file: BinaryIO, pack: Pack) -> None:
        file.truncate(0)
        room_bytes = min(self._limit_bytes, self._folder.disk_room_bytes())
        index: list[_Linear] = []
        for name, packed in pack():
            tensors = {}
            for part, tensor in packed.tensors.items():
                file.seek(-file.tell() % _ALIGNMENT_BYTES, os.SEEK_CUR)
                offset, data = file.tell(), _bytes_of(tensor)
                if offset + len(data) > room_bytes:
                    raise PackedWeightsUnavailable(
                        f"{self._folder.path} has room for {room_bytes} bytes of them "
                        "(model.packed_weights_bytes, or what the disk has left)"
                    )
                file.write(data)
                fingerprint = xxhash.xxh3_64_intdigest(data)
                tensors[part] = _Tensor(offset, str(tensor.dtype), tuple(tensor.shape), fingerprint)
            index.append(_Linear(name, packed.out_features, packed.in_features, tensors))
        encoded = msgspec.msgpack.encode(index)
        file.write(encoded + len(encoded).to_bytes(8, "little") + xxhash.xxh3_64_digest(encoded) + _MAGIC)
        file.flush()


@contextlib.contextmanager
def _partial_file(path: Path, clock: Clock) -> Iterator[BinaryIO]:
    """The file, ours alone. The lock goes with the process, so one that died leaves nothing to wait for.

    Raises ``PackedWeightsUnavailable`` when another process does not let go of it within ``_PACKING_DEADLINE_S``.
    """
    until_s = clock.now_s() + _PACKING_DEADLINE_S
    while True:
        with (
            open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file,
            locked(file, clock, until_s) as is_ours,
        ):
            if not is_ours:
                raise PackedWeightsUnavailable(f"{path} is written by another process that does not end")
            if is_same_file(path, file):  # or it was renamed or removed before we had the lock
                yield file
                return


def _map_if_whole(path: Path, clock: Clock) -> dict[str, PackedLinear] | None:
    """None when there is no such file, or when it is not what was written."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < _FOOTER_BYTES:
                return None
            mapping = map_for_reading(file, clock)
    except FileNotFoundError:
        return None
    view = memoryview(mapping)
    index = _read_index(view)
    if index is None:
        return None
    packed = {}
    for linear in index:
        tensors = {name: _tensor_in(view, entry) for name, entry in linear.tensors.items()}
        entries = zip(tensors.values(), linear.tensors.values(), strict=True)
        # Reads the whole file. It is about to be needed in memory anyway.
        if any(xxhash.xxh3_64_intdigest(_bytes_of(tensor)) != entry.fingerprint for tensor, entry in entries):
            return None
        packed[linear.name] = PackedLinear(tensors, linear.out_features, linear.in_features)
    return packed


def _read_index(view: memoryview) -> list[_Linear] | None:
    end = len(view) - _FOOTER_BYTES
    footer = bytes(view[end:])
    start = end - int.from_bytes(footer[:8], "little")
    if not footer.endswith(_MAGIC) or start < 0 or xxhash.xxh3_64_digest(view[start:end]) != footer[8:16]:
        return None
    return msgspec.msgpack.decode(view[start:end], type=list[_Linear])


def _tensor_in(view: memoryview, entry: _Tensor) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype.removeprefix("torch."))
    count = torch.Size(entry.shape).numel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to, which is the intention
        return torch.frombuffer(view, dtype=dtype, count=count, offset=entry.offset).view(entry.shape)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data: npt.NDArray[np.uint8] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return data.data
