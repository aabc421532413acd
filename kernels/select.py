"""Which implementation of each operation a model uses: decided once, when it is loaded, and passed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

import torch

from eagleray.kernels.activation import api as activation
from eagleray.kernels.activation import native as native_activation
from eagleray.kernels.cache_folder import CacheFolderUnknown, kernel_folder
from eagleray.kernels.embedding import api as embedding
from eagleray.kernels.embedding import native as native_embedding
from eagleray.kernels.features import api as features
from eagleray.kernels.features import native as native_features
from eagleray.kernels.kv_ops import api as kv_ops
from eagleray.kernels.kv_ops import native as native_kv_ops
from eagleray.kernels.linear.api import LinearFormat
from eagleray.kernels.linear.native import NativeLinearFormat
from eagleray.kernels.linear.onednn import OneDnnFormat, onednn_is_there
from eagleray.kernels.linear.panels import PanelLinearFormat
from eagleray.kernels.linear.quantization import Quantization, QuantizationUnsupported
from eagleray.kernels.linear.reference import TorchQuantizedFormat
from eagleray.kernels.native.build import FolderRefused, NativeUnavailable, supported_levels
from eagleray.kernels.native.library import ELEMENTS, NativeLibrary, load_library
from eagleray.kernels.norm_rope import api as norm_rope
from eagleray.kernels.norm_rope import native as native_norm_rope
from eagleray.kernels.norm_rope.head_norms import HeadNorms
from eagleray.kernels.paged_attention import api as paged_attention
from eagleray.kernels.paged_attention import native as native_paged_attention
from eagleray.kernels.paged_attention.plan import AttentionPlan
from eagleray.kernels.replay.api import ComputeAnew, Replayer
from eagleray.kernels.replay.native import NativeReplayer
from eagleray.kernels.sampling import api as sampling
from eagleray.kernels.sampling import native as native_sampling
from eagleray.kernels.sampling.batch import SamplingBatch, SharedNoise

KernelChoice = Literal["auto", "native", "torch"]

# Of the head, whatever the other layers have: it is a fourth of a small model's bytes, and what rounding it does to a
# logit nothing after it evens out. So 8 bits, and its activations as they are.
HEAD_QUANTIZATION: Final = "int8"


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of every operation that has several; signatures and meaning as in the ``api`` of each."""

    description: str  # one line, for logs and ``eagleray doctor``
    is_native: bool  # else torch computes
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    gather_rows: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]
    rotary_angles: Callable[[torch.Tensor, int, torch.Tensor, float, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
    rotate_and_store: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, HeadNorms | None], torch.Tensor
    ]
    paged_attention: Callable[[torch.Tensor, torch.Tensor, AttentionPlan, float, int | None], torch.Tensor]
    silu_and_multiply: Callable[[torch.Tensor], torch.Tensor]
    join_columns: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    pass_features: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    linear_format: LinearFormat | None  # None: weights stay rows of their own dtype, and torch computes
    head_format: LinearFormat | None  # of the layer that makes logits; None: as the others
    draft_format: LinearFormat | None  # of all layers of a network that only guesses; None: as the others
    sample_tokens: Callable[[torch.Tensor, SamplingBatch], torch.Tensor]
    guess_tokens: Callable[[torch.Tensor, SharedNoise, torch.Tensor | None], torch.Tensor]
    copy_blocks: Callable[[torch.Tensor, torch.Tensor, Sequence[tuple[int, int]]], None]
    new_replayer: Callable[[], Replayer]  # one for steps of one kind

    def for_drafts(self) -> Kernels:
        """For networks that only guess: what rounding makes wrong costs time, never a token."""
        if self.draft_format is None:
            return self
        return replace(self, linear_format=self.draft_format, head_format=None)


TORCH_KERNELS: Final = Kernels(
    description="torch",
    is_native=False,
    rms_norm=norm_rope.rms_norm,
    gather_rows=embedding.gather_rows,
    rotary_angles=norm_rope.rotary_angles,
    rotate_and_store=norm_rope.rotate_and_store,
    paged_attention=paged_attention.paged_attention,
    silu_and_multiply=activation.silu_and_multiply,
    join_columns=activation.join_columns,
    pass_features=features.pass_features,
    linear_format=None,
    head_format=None,
    draft_format=None,
    sample_tokens=sampling.sample_tokens,
    guess_tokens=sampling.guess_tokens,
    copy_blocks=kv_ops.copy_blocks,
    new_replayer=ComputeAnew,
)


def select_kernels(
    choice: KernelChoice,
    dtype: torch.dtype,
    device: str,
    num_threads: int,
    cache_folder: Path | None = None,
    quantization: Quantization | None = None,
) -> Kernels:
    """The best implementations for computing in ``dtype`` on ``device``, with a KV pool of the same dtype.

    Args:
        choice: ``"auto"``: native where possible; ``"native"``: that or an error; ``"torch"``: the reference.
        num_threads: that one operation may use.
        cache_folder: of compiled libraries; None: the user's.
        quantization: of linear layers; None: they compute in ``dtype``.

    Raises:
        NativeUnavailable: ``"native"`` was chosen and cannot be had, for the reason in the message.
        QuantizationUnsupported: with this dtype or device.
    """
    if quantization is not None and (device != "cpu" or dtype not in ELEMENTS):
        raise QuantizationUnsupported(f"{quantization} needs float32 or bfloat16 on a CPU, not {dtype} on {device}")
    if choice == "torch":
        return _torch_kernels("torch", dtype, device, quantization)
    try:
        if device != "cpu" or dtype not in ELEMENTS:
            raise NativeUnavailable(f"the native library does not compute in {dtype} on {device}")
        library = load_best_library(num_threads, cache_folder)
    except NativeUnavailable as error:
        if choice == "native":
            raise
        return _torch_kernels(f"torch ({error})", dtype, device, quantization)
    return native_kernels(library, dtype, quantization)


def load_best_library(num_threads: int, cache_folder: Path | None = None) -> NativeLibrary:
    """The native library for this machine; see ``select_kernels``. Raises ``NativeUnavailable``."""
    try:
        folder = cache_folder or kernel_folder()
    except CacheFolderUnknown as error:
        raise NativeUnavailable(str(error)) from None
    best, *others = supported_levels()
    try:
        return load_library(best, folder, num_threads)
    except FolderRefused:
        raise
    except NativeUnavailable as error:  # an old compiler may not know the best level of a new CPU
        for level in others:
            with suppress(NativeUnavailable):
                return replace(load_library(level, folder, num_threads), lost=f"{best}: {error}")
        raise error


def native_kernels(library: NativeLibrary, dtype: torch.dtype, quantization: Quantization | None = None) -> Kernels:
    """All operations by ``library``."""
    linear_format: LinearFormat
    if quantization is not None:
        linear_format = PanelLinearFormat(library, quantization)
    elif dtype is torch.float32:
        linear_format = NativeLinearFormat(library)
    else:
        linear_format = PanelLinearFormat(library, "bfloat16")
    lost = f" (not {library.lost})" if library.lost else ""
    linear_name = quantization or str(dtype).removeprefix("torch.")
    threads = f"threads: {library.num_threads}" + ("" if library.has_openmp else ", built without OpenMP")
    return Kernels(
        description=f"native ({library.level}, {threads}), linear layers: {linear_name}{lost}",
        is_native=True,
        rms_norm=partial(native_norm_rope.rms_norm, library),
        gather_rows=partial(native_embedding.gather_rows, library),
        rotary_angles=partial(native_norm_rope.rotary_angles, library),
        rotate_and_store=partial(native_norm_rope.rotate_and_store, library),
        paged_attention=partial(native_paged_attention.paged_attention, library),
        silu_and_multiply=partial(native_activation.silu_and_multiply, library),
        join_columns=partial(native_activation.join_columns, library),
        pass_features=partial(native_features.pass_features, library),
        linear_format=linear_format,
        head_format=PanelLinearFormat(library, HEAD_QUANTIZATION) if quantization else None,
        draft_format=PanelLinearFormat(library, "w8a8"),
        sample_tokens=partial(native_sampling.sample_tokens, library),
        guess_tokens=partial(native_sampling.guess_tokens, library),
        copy_blocks=partial(native_kv_ops.copy_blocks, library),
        new_replayer=partial(NativeReplayer, library),
    )


def _torch_kernels(description: str, dtype: torch.dtype, device: str, quantization: Quantization | None) -> Kernels:
    if quantization is not None:
        return replace(
            TORCH_KERNELS,
            description=f"{description}, linear layers: {quantization}",
            linear_format=TorchQuantizedFormat(quantization),
            head_format=TorchQuantizedFormat(HEAD_QUANTIZATION),
        )
    if device == "cpu" and dtype is torch.bfloat16 and onednn_is_there():
        return replace(
            TORCH_KERNELS, description=f"{description}, linear layers: bfloat16 by oneDNN", linear_format=OneDnnFormat()
        )
    return replace(TORCH_KERNELS, description=description)
