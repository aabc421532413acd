"""Weights from safetensors into a decoder, one tensor at a time: no second copy of the model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from eagleray.core.errors import ConfigError
from eagleray.kernels.select import TORCH_KERNELS, Kernels
from eagleray.models.decoder import Decoder
from eagleray.models.model_config import ModelConfig
from eagleray.models.weight_files import weight_files
from eagleray.models.weight_filling import fill_view, require_filled
from eagleray.models.weight_names import EMBEDDING, LM_HEAD, checkpoint_views

_DERIVED_SUFFIX: Final = ".rotary_emb.inv_freq"  # old checkpoints store what follows from the configuration


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None = None,
    kernels: Kernels = TORCH_KERNELS,
    field: str = "model.path",
) -> Decoder:
    """Build the decoder and fill it from ``model.safetensors`` or from the files of ``model.safetensors.index.json``.

    Args:
        folder: of the checkpoint.
        config: from ``registry.load_model_config``.
        dtype: to compute in; float32, bfloat16 and float16 tensors are converted on the way.
        device: where the weights go.
        progress: called after each tensor with (tensors loaded, tensors in all).
        kernels: to compute with, for this dtype and device.
        field: of the configuration that named the folder.

    Raises:
        ConfigError: a file or tensor is missing, unexpected, damaged, or of the wrong shape or type.
    """
    decoder = Decoder(config, dtype, device, kernels)
    views = checkpoint_views(decoder)
    loaded: set[str] = set()
    for path, name, read in _stored_tensors(folder, field):
        if name == LM_HEAD and config.tie_word_embeddings:
            continue  # compared with the embedding below, which may come in a later file
        if name.endswith(_DERIVED_SUFFIX):
            continue
        fill_view(views, name, read(), field, path)
        loaded.add(name)
        if progress is not None:
            progress(len(loaded), len(views))
    require_filled(views, loaded, field, folder)
    if config.tie_word_embeddings:
        _require_tied(folder, field, decoder.embedding)
    decoder.prepare()
    return decoder


def _require_tied(folder: Path, field: str, embedding: torch.Tensor) -> None:
    """Some checkpoints store a tied head as well. If it differs, tying would change the result."""
    for path, name, read in _stored_tensors(folder, field):
        if name == LM_HEAD and not torch.equal(read().to(embedding), embedding):
            way_out = f"set it to false: {path.name} holds a {LM_HEAD} that differs from {EMBEDDING}"
            raise ConfigError("config.json: tie_word_embeddings", True, way_out)


def _stored_tensors(folder: Path, field: str) -> Iterator[tuple[Path, str, Callable[[], torch.Tensor]]]:
    """(file, tensor name, reader) of every tensor; the reader is valid until the next one is asked for."""
    for path in weight_files(folder, field):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  not a dictionary
                    yield path, name, partial(file.get_tensor, name)
        except SafetensorError as error:
            raise ConfigError(field, str(path), f"is damaged ({error}); fetch it again") from None
