"""Names, dtypes and shapes of a draft checkpoint's tensors, from its files' headers. No torch, and no weights read.

What is planned before anything starts must not take the seconds and the memory that loading takes.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from eagleray.core.errors import ConfigError
from eagleray.models.weight_files import weight_files

FIELD: Final = "speculation.model"  # what the errors of draft checkpoints are about
TORCH_FILE: Final = "pytorch_model.bin"
MEDUSA_STEM: Final = "medusa_lm_head"
_SAFETENSORS_DTYPES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_TORCH_DTYPES: Final = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}
_OTHER_DTYPE: Final = "other"  # tables of token ids, and what loading refuses
_MAX_HEADER_BYTES: Final = 100 * 2**20  # as the format allows


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file describes it."""

    dtype: str  # a key of ``kv_layout.DTYPE_BYTES``, or "other"
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def head_shapes(folder: Path) -> dict[str, StoredTensor]:
    """Of safetensors, or ``pytorch_model.bin``. Raises ``ConfigError``."""
    if (folder / TORCH_FILE).is_file() and not (folder / "model.safetensors").is_file():
        return _torch_header(folder / TORCH_FILE)
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder, FIELD):
        tensors |= _safetensors_header(path)
    return tensors


def medusa_file(folder: Path) -> Path:
    """``medusa_lm_head``, as ``.safetensors`` or ``.pt``. Raises ``ConfigError`` if there is neither."""
    for suffix in (".safetensors", ".pt"):
        path = folder / f"{MEDUSA_STEM}{suffix}"
        if path.is_file():
            return path
    raise ConfigError(FIELD, str(folder), f"has neither {MEDUSA_STEM}.safetensors nor {MEDUSA_STEM}.pt; fetch it again")


def medusa_shapes(folder: Path) -> dict[str, StoredTensor]:
    """Of ``medusa_lm_head``. Raises ``ConfigError``."""
    path = medusa_file(folder)
    return _safetensors_header(path) if path.suffix == ".safetensors" else _torch_header(path)


def damaged(path: Path, error: Exception) -> ConfigError:
    """The refusal of a file that cannot be read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ConfigError(FIELD, str(path), f"is damaged, or holds more than tensors ({reason}); fetch it again")


def _safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The file begins with the length of a JSON object, and that (github.com/huggingface/safetensors)."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError("its header is too large")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: StoredTensor(_SAFETENSORS_DTYPES.get(entry["dtype"], _OTHER_DTYPE), tuple(entry["shape"]))
            for name, entry in header.items()
        }
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError) as error:
        raise damaged(path, error) from None


def _torch_header(path: Path) -> dict[str, StoredTensor]:
    """Of what ``torch.save`` writes since version 1.6: a zip file with a pickle, beside it the bytes of storages."""
    try:
        with zipfile.ZipFile(path) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            with archive.open(name) as file:
                tensors = _HeaderUnpickler(file).load()
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError, TypeError) as error:
        raise damaged(path, error) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, StoredTensor) for tensor in tensors.values()):
        raise ConfigError(FIELD, str(path), "holds something else than tensors by name")
    return dict(tensors)


class _HeaderUnpickler(pickle.Unpickler):
    """Makes a ``StoredTensor`` where torch makes a tensor, and refuses everything else: no code of the file runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _REBUILDERS:
            return _REBUILDERS[name]
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> str:
        """The name of a storage's type."""
        return str(pid[1])


def _rebuild_tensor(storage: str, offset: int, size: tuple[int, ...], *rest: object) -> StoredTensor:
    return StoredTensor(_TORCH_DTYPES.get(storage, _OTHER_DTYPE), tuple(size))


def _rebuild_parameter(tensor: StoredTensor, *rest: object) -> StoredTensor:
    return tensor


_REBUILDERS: Final[dict[str, Callable[..., StoredTensor]]] = {
    "_rebuild_tensor_v2": _rebuild_tensor,
    "_rebuild_parameter": _rebuild_parameter,
}
