"""Weights from safetensors into a decoder: mapped where they serve as they are, else packed one layer at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

from eagleray.kernels.linear.api import LinearFormat, PackedLinear
from eagleray.kernels.select import TORCH_KERNELS, Kernels
from eagleray.models.checkpoint import Checkpoint
from eagleray.models.decoder import Decoder
from eagleray.models.model_config import ModelConfig
from eagleray.models.packed_weights import PackedWeightFiles, PackedWeightsUnavailable
from eagleray.models.weight_names import EMBEDDING, HEAD, checkpoint_views, linear_names, norm_views

_logger: Final = logging.getLogger(__name__)

OnTensors = Callable[[int, int], None]


def load_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: OnTensors | None = None,
    kernels: Kernels = TORCH_KERNELS,
    packed_files: PackedWeightFiles | None = None,
    field: str = "model.path",
) -> Decoder:
    """Build the decoder with the weights of ``model.safetensors``, or of the files of its index.

    Args:
        folder: of the checkpoint. Its files stay mapped, so they must not change while the decoder is in use.
        config: from ``registry.load_model_config``.
        dtype: to compute in; float32, bfloat16 and float16 tensors are converted on the way.
        device: where the weights go.
        progress: called after each tensor with (tensors loaded, tensors in all).
        kernels: to compute with, for this dtype and device.
        packed_files: where packed weights are kept for the next start and shared with other processes; None: this
            process packs for itself.
        field: of the configuration that named the folder.

    Raises:
        QuantizationUnsupported: the kernels' formats cannot hold a weight of this shape.
        ConfigError: a file or tensor is missing, unexpected, damaged, or of the wrong shape or type.
    """
    checkpoint = Checkpoint(folder, field)
    decoder = Decoder(config, dtype, device, kernels)  # its memory is not touched until it is filled
    views = checkpoint_views(decoder)
    checkpoint.check({name: view.shape for name, view in views.items()}, is_head_tied=config.tie_word_embeddings)
    if config.tie_word_embeddings:
        checkpoint.check_tied_head()
    loaded = _Counter(len(views), progress)
    if kernels.linear_format is None:
        _fill(views, checkpoint, loaded)
        return decoder
    _fill(norm_views(decoder), checkpoint, loaded)
    decoder.embedding = nn.Parameter(checkpoint.mapped_anew(EMBEDDING), requires_grad=False)
    loaded.add(1)
    formats = _Formats(kernels.linear_format, kernels.head_format or kernels.linear_format)
    _bind_linears(decoder, checkpoint, formats, packed_files, loaded)
    return decoder


@dataclass(frozen=True, slots=True)
class _Formats:
    """Of the layers, and of the one that makes logits."""

    layers: LinearFormat
    head: LinearFormat

    def of(self, name: str) -> LinearFormat:
        return self.head if name == HEAD else self.layers

    @property
    def layout(self) -> str | None:
        if self.layers.layout is None or self.head.layout is None:
            return None
        return self.layers.layout if self.head == self.layers else f"{self.layers.layout}, head {self.head.layout}"


class _Counter:
    """Tells how many tensors have been loaded; those of a linear layer when it is packed."""

    def __init__(self, total: int, report: OnTensors | None) -> None:
        self._done, self._total, self._report = 0, total, report

    def complete(self) -> None:
        if self._done < self._total:
            self.add(self._total)

    def add(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        if self._report is not None:
            self._report(self._done, self._total)


def _fill(views: dict[str, torch.Tensor], checkpoint: Checkpoint, loaded: _Counter) -> None:
    for name, view in views.items():
        view.copy_(checkpoint[name])
        loaded.add(1)


def _bind_linears(
    decoder: Decoder,
    checkpoint: Checkpoint,
    formats: _Formats,
    files: PackedWeightFiles | None,
    loaded: _Counter,
) -> None:
    """Give every linear layer its product: from a file that others map too if possible, else of this process alone."""
    linears = {names.name: names.linear for names in linear_names(decoder)}
    for name, packed in _packed(decoder, checkpoint, formats, files, loaded):
        linears[name].adopt(formats.of(name).bind(packed))
    loaded.complete()


def _packed(
    decoder: Decoder,
    checkpoint: Checkpoint,
    formats: _Formats,
    files: PackedWeightFiles | None,
    loaded: _Counter,
) -> Iterator[tuple[str, PackedLinear]]:
    def pack() -> Iterator[tuple[str, PackedLinear]]:
        return _pack_all(decoder, checkpoint, formats, loaded)

    if files is not None and formats.layout is not None:
        try:
            return iter(files.get(formats.layout, pack).items())
        except PackedWeightsUnavailable as error:
            _logger.warning("packed weights are this process's own: %s", error)
    return pack()


def _pack_all(
    decoder: Decoder, checkpoint: Checkpoint, formats: _Formats, loaded: _Counter
) -> Iterator[tuple[str, PackedLinear]]:
    """One layer after the other, so that nothing but the packed form is ever whole in memory."""
    for names in linear_names(decoder):
        bias = checkpoint.concatenated(names.biases) if names.biases else None
        yield names.name, formats.of(names.name).pack(checkpoint.concatenated(names.weights), bias)
        loaded.add(len(names.weights) + len(names.biases))
