"""Content identity of a checkpoint: equal on every machine that has the same files, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_WEIGHT_PATTERNS: Final = ("*.safetensors", "*.bin")
_WHOLE_FILE_BYTES: Final = 64 * 2**20  # up to here a file is hashed whole
_NUM_SAMPLES: Final = 1024  # of a larger file: enough to meet every matrix of a layer
_SAMPLE_BYTES: Final = 16 * 2**10


def compute_model_identity(folder: Path, revision: str = "", quantization: str | None = None) -> str:
    """Hash of ``config.json`` and of the weight files' names, sizes and bytes, as short hexadecimal text.

    Of a file larger than 64 MiB, its head and 1024 evenly spaced samples stand for the whole, so that start-up does not
    read a large checkpoint twice; ``revision`` is there to tell apart what differs only between the samples.
    ``quantization`` of the weights at load changes what they compute, so it is part of the identity too.
    """
    hasher = hashlib.blake2b(digest_size=16, person=b"eagleray-model")
    files = [folder / "config.json", *sorted(path for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern))]
    for path in files:
        _update_with_length(hasher, path.name.encode())
        hasher.update(path.stat().st_size.to_bytes(8, "little"))
        for part in _read_parts(path):
            hasher.update(part)
    _update_with_length(hasher, revision.encode())
    if quantization is not None:
        _update_with_length(hasher, quantization.encode())
    return hasher.hexdigest()


def _update_with_length(hasher: hashlib.blake2b, text: bytes) -> None:
    hasher.update(len(text).to_bytes(4, "little") + text)


def _read_parts(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_BYTES:
            yield file.read()
            return
        for index in range(_NUM_SAMPLES):
            file.seek(index * (size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)
