"""The one decoder, assembled from a ``ModelConfig``."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial, reduce
from itertools import islice
from typing import Protocol

import torch
from torch import nn

from eagleray.core.kv_layout import LayerGroup
from eagleray.kernels.paged_attention.api import AttentionPlan
from eagleray.kernels.replay.api import StepInputs
from eagleray.kernels.select import TORCH_KERNELS, Kernels
from eagleray.models.attention import Attention
from eagleray.models.linear import Linear
from eagleray.models.mlp import GatedMLP
from eagleray.models.model_config import ModelConfig
from eagleray.models.norm import RMSNorm
from eagleray.models.rope import RotaryEmbedding


class DecoderLayer:
    """Attention and MLP, each behind its norm and added to the residual stream.

    Layers are plain objects rather than ``nn.Module``: nothing is trained here, and what a module's call and attribute
    look-up cost is more than a small kernel.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_index: int,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype=dtype, device=device)
        self.attention = Attention(config, layer_index, kernels, dtype=dtype, device=device)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype=dtype, device=device)
        self.mlp = GatedMLP(config, kernels, dtype=dtype, device=device)

    def __call__(
        self,
        hidden: torch.Tensor,
        cos_T: torch.Tensor,
        sin_T: torch.Tensor,
        kv_layer: torch.Tensor,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]; arguments as in ``Attention``."""
        after_attention = self.attention(self.attention_norm(hidden), cos_T, sin_T, kv_layer, plan, hidden)
        return self.mlp(self.mlp_norm(after_attention), after_attention)

    def linears(self) -> tuple[Linear, ...]:
        return (*self.attention.linears(), *self.mlp.linears())


class Companion(Protocol):
    """What computes beside a decoder in one of its steps, from what the decoder computes there."""

    @property
    def capture_layers(self) -> tuple[int, ...]:
        """It reads the residual streams that enter these layers (rising), side by side; none: the decoder's result."""
        ...

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Its own tensors of the step: what it computes depends on their shapes."""
        ...

    @property
    def identity(self) -> Hashable:
        """Equal only between companions that compute the same with the same tensors, ``inputs`` aside: the addresses of
        pools, the network whose weights they read."""
        ...

    def compute(self, streams: torch.Tensor) -> torch.Tensor:
        """What it makes of what it reads, [T, any width]."""
        ...


@dataclass(frozen=True, slots=True)
class CaptureStreams:
    """Implements ``Companion``: hands out what it reads."""

    capture_layers: tuple[int, ...]
    inputs: tuple[torch.Tensor, ...] = ()
    identity: Hashable = None

    def compute(self, streams: torch.Tensor) -> torch.Tensor:
        return streams


class Decoder:
    """Token ids to hidden states to logits, with KV in a paged pool that the caller owns.

    Weights are left uninitialised; see ``loader.load_model`` and ``random_weights.random_model``.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kernels: Kernels = TORCH_KERNELS,
    ) -> None:
        self.config = config
        self.dtype = dtype  # that it computes in
        # A loader may put another dtype here: the checkpoint's own, mapped from its file.
        self.embedding = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device), requires_grad=False
        )
        self.layers = [
            DecoderLayer(config, index, kernels, dtype=dtype, device=device) for index in range(config.num_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype=dtype, device=device)
        self.lm_head = Linear(
            config.hidden_size,
            (config.vocab_size,),
            bias=False,
            dtype=dtype,
            device=device,
            weight=self.embedding if config.tie_word_embeddings else None,
        )
        self._rope = RotaryEmbedding(config.rope, config.head_dim, device, kernels)
        self._kernels = kernels
        self._replayer = kernels.new_replayer()

    def layer_group(self, dtype: str, name: str = "target") -> LayerGroup:
        """Shape of this model's KV with elements of ``dtype``, a key of ``kv_layout.DTYPE_BYTES``."""
        return self.config.kv_layer_group(dtype, name)

    def forward(
        self,
        input_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        kv: torch.Tensor,
        plan: AttentionPlan,
        num_layers: int | None = None,
    ) -> torch.Tensor:
        """Compute a step's tokens and write their KV.

        Args:
            input_ids_T: int64 [T], the sequences of the plan one after the other.
            positions_T: int64 [T], position of each token in its sequence.
            kv: the pool [num_blocks, L, 2, HKV, block_size, D], contiguous; written at ``plan.slots_T``.
            plan: of this step.
            num_layers: leave after the first so many, straight for the final norm; None: run all.

        Returns:
            [T, hidden], after the final norm.
        """
        return self._run_layers(input_ids_T, positions_T, kv, plan, num_layers, None)[0]

    def forward_with_features(
        self,
        input_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        kv: torch.Tensor,
        plan: AttentionPlan,
        capture_layers: tuple[int, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``forward``, and beside its result what a draft head reads: the residual stream entering each of
        ``capture_layers`` (rising), side by side, [T, len(capture_layers) * hidden]; without any, the result itself."""
        return self.forward_with(input_ids_T, positions_T, kv, plan, CaptureStreams(capture_layers))

    def forward_with(
        self,
        input_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        kv: torch.Tensor,
        plan: AttentionPlan,
        companion: Companion,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``forward``, and what ``companion`` makes of the same step."""
        return self._run_layers(input_ids_T, positions_T, kv, plan, None, companion)

    def _run_layers(
        self,
        input_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        kv: torch.Tensor,
        plan: AttentionPlan,
        num_layers: int | None,
        companion: Companion | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = plan.tensors
        inputs: tuple[torch.Tensor, ...] = ()
        beside: Hashable = None
        if companion is not None:
            inputs = companion.inputs
            beside = (type(companion), companion.capture_layers, companion.identity)
        normed, *made = self._replayer.run(
            partial(self._compute_layers, input_ids_T, positions_T, kv, plan, num_layers, companion),
            StepInputs((input_ids_T, positions_T, *tensors.fixed, *inputs), tensors.ragged),
            (kv.data_ptr(), kv.shape, plan.block_size_tokens, plan.first_key, num_layers, beside),
        )
        return normed, made[0] if made else normed

    def _compute_layers(
        self,
        input_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        kv: torch.Tensor,
        plan: AttentionPlan,
        num_layers: int | None,
        companion: Companion | None,
    ) -> tuple[torch.Tensor, ...]:
        """(What the final norm makes of the last layer's result, what the companion makes, if there is one)."""
        hidden = self._kernels.gather_rows(self.embedding, input_ids_T, self.dtype)
        angles = self._rope.angles(positions_T, self.dtype)
        capture_layers = companion.capture_layers if companion is not None else ()
        captured = []
        layers = zip(self.layers, kv.unbind(1), strict=True)
        for index, (layer, kv_layer) in enumerate(islice(layers, num_layers)):
            if index in capture_layers:
                captured.append(hidden)
            hidden = layer(hidden, *angles, kv_layer, plan)
        normed = self.norm(hidden)
        if companion is None:
            return (normed,)
        return normed, companion.compute(reduce(self._kernels.join_columns, captured) if captured else normed)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] of ``forward`` -> float32 [N, V]."""
        return self.lm_head(hidden, dtype=torch.float32)
