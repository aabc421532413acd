"""A checkpoint's tensors, mapped from their files: nothing is copied, and all processes see the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from eagleray.core.errors import ConfigError
from eagleray.models.weight_files import weight_files
from eagleray.models.weight_filling import check_tensor, require_all
from eagleray.models.weight_names import EMBEDDING, LM_HEAD

_DERIVED_SUFFIX: Final = ".rotary_emb.inv_freq"  # old checkpoints store what follows from the configuration


class Checkpoint:
    """The tensors of ``model.safetensors``, or of the files of ``model.safetensors.index.json``.

    Raises ``ConfigError`` for files that are missing or damaged. They must not change while this is in use.
    """

    def __init__(self, folder: Path, field: str = "model.path") -> None:
        self._folder = folder
        self._field = field  # of the configuration, that named the folder
        self._path_of: dict[str, Path] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for path in weight_files(folder, field):
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
            except SafetensorError as error:
                raise ConfigError(field, str(path), f"is damaged ({error}); fetch it again") from None
            self._tensors |= tensors
            self._path_of |= dict.fromkeys(tensors, path)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor as stored. Its memory is the file: only to be read."""
        return self._tensors[name]

    def mapped_anew(self, name: str) -> torch.Tensor:
        """The same, in a mapping of its own. Tensors of a file share one, which has all in this process's memory that
        was read through it, for as long as one of them is in use."""
        with safe_open(self._path_of[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def concatenated(self, names: Iterable[str]) -> torch.Tensor:
        """Tensors one below the other; a single one is not copied."""
        tensors = [self._tensors[name] for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def check(self, shapes: Mapping[str, torch.Size], *, is_head_tied: bool) -> None:
        """Raises ``ConfigError`` unless these tensors are here, no others that count, all in a dtype that we know."""
        for name, tensor in self._tensors.items():
            if name.endswith(_DERIVED_SUFFIX) or (name == LM_HEAD and is_head_tied):
                continue
            check_tensor(name, tensor, shapes.get(name), self._field, self._path_of[name])
        require_all(shapes, self._tensors, self._field, self._folder)

    def check_tied_head(self) -> None:
        """Some checkpoints store a tied head as well. If it differs, tying would change the result: ``ConfigError``."""
        head = self._tensors.get(LM_HEAD)
        if head is not None and not torch.equal(head, self._tensors[EMBEDDING]):
            way_out = f"set it to false: {self._path_of[LM_HEAD].name} holds a {LM_HEAD} that differs from {EMBEDDING}"
            raise ConfigError("config.json: tie_word_embeddings", True, way_out)
