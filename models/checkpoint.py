"""A checkpoint's tensors, mapped from their files: nothing is copied, and all processes see the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from eagleray.core.errors import ConfigError
from eagleray.models.weight_files import weight_files
from eagleray.models.weight_names import EMBEDDING, LM_HEAD

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_DERIVED_SUFFIX: Final = ".rotary_emb.inv_freq"  # old checkpoints store what follows from the configuration


class Checkpoint:
    """The tensors of ``model.safetensors``, or of the files of ``model.safetensors.index.json``.

    Raises ``ConfigError`` for files that are missing or damaged. They must not change while this is in use.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path_of: dict[str, Path] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
            except SafetensorError as error:
                raise ConfigError("model.path", str(path), f"is damaged ({error}); fetch it again") from None
            self._tensors |= tensors
            self._path_of |= dict.fromkeys(tensors, path)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor as stored. Its memory is the file: only to be read."""
        return self._tensors[name]

    def concatenated(self, names: Iterable[str]) -> torch.Tensor:
        """Tensors one below the other; a single one is not copied."""
        tensors = [self._tensors[name] for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def check(self, shapes: Mapping[str, torch.Size], *, is_head_tied: bool) -> None:
        """Raises ``ConfigError`` unless these tensors are here, no others that count, all in a dtype that we know."""
        for name, tensor in self._tensors.items():
            if name.endswith(_DERIVED_SUFFIX) or (name == LM_HEAD and is_head_tied):
                continue
            self._check_tensor(name, tensor, shapes.get(name))
        missing = [name for name in shapes if name not in self._tensors]
        if missing:
            count = f"{len(missing)} tensors, the first of them {missing[0]}" if len(missing) > 1 else missing[0]
            raise ConfigError("model.path", str(self._folder), f"the checkpoint lacks {count}; fetch it again, whole")

    def check_tied_head(self) -> None:
        """Some checkpoints store a tied head as well. If it differs, tying would change the result: ``ConfigError``."""
        head = self._tensors.get(LM_HEAD)
        if head is not None and not torch.equal(head, self._tensors[EMBEDDING]):
            way_out = f"set it to false: {self._path_of[LM_HEAD].name} holds a {LM_HEAD} that differs from {EMBEDDING}"
            raise ConfigError("config.json: tie_word_embeddings", True, way_out)

    def _check_tensor(self, name: str, tensor: torch.Tensor, shape: torch.Size | None) -> None:
        path = str(self._path_of[name])
        if shape is None:
            raise ConfigError("model.path", path, f"tensor {name} has no place in the model that config.json describes")
        if tensor.shape != shape:
            shapes = f"{list(tensor.shape)}, config.json implies {list(shape)}"
            raise ConfigError("model.path", path, f"tensor {name} has shape {shapes}; the two do not belong together")
        if tensor.dtype not in _DTYPES:
            raise ConfigError(
                "model.path", path, f"tensor {name} is {tensor.dtype}; quantised weights are not supported"
            )
