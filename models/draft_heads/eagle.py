"""EAGLE 1, 2 and 3: a small decoder that reads the target's features beside the tokens.

Version 1: Li et al., arXiv 2401.15077; 2: arXiv 2406.16858 (the same network, drafting trees); 3: arXiv 2503.01840.

**Slots.** Slot p of the head's KV holds the pair (token p, feature of token p - 1) at rope position p - 1. So slots lie
beside the target's of the same token, a block depends on no token beyond it, and rotation is as in training, where the
pair is counted by its feature. Nothing comes before token 0: slot 0 is written with some feature and not read, as
attention begins at slot 1 (``AttentionPlan.first_key``).
"""

from __future__ import annotations

from functools import partial
from itertools import chain

import torch
from torch import nn

from eagleray.core.kv_layout import LayerGroup
from eagleray.kernels.paged_attention.api import AttentionPlan
from eagleray.kernels.replay.api import StepInputs
from eagleray.kernels.select import TORCH_KERNELS, Kernels
from eagleray.models.attention import Attention
from eagleray.models.decoder import Decoder, DecoderLayer
from eagleray.models.draft_heads.draft_config import EagleConfig
from eagleray.models.linear import Linear
from eagleray.models.mlp import GatedMLP
from eagleray.models.norm import RMSNorm
from eagleray.models.rope import RotaryEmbedding


class FusedInput:
    """Versions 1 and 2: one linear layer over token and feature; what it makes is attended to, and the residual."""

    def __init__(
        self, config: EagleConfig, kernels: Kernels, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        size = config.layers.hidden_size
        self._join_columns = kernels.join_columns
        self.fusion = Linear(2 * size, (size,), bias=config.fusion_bias, dtype=dtype, device=device)

    def __call__(self, embedded: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of [T, hidden] -> what attention reads, [T, hidden], and the residual stream, [T, hidden]."""
        fused = self.fusion(self._join_columns(embedded, feature))
        return fused, fused

    def linears(self) -> tuple[Linear, ...]:
        return (self.fusion,)


class PairedInput:
    """Version 3: attention reads token and feature side by side, each normed; the feature is the residual."""

    def __init__(
        self, config: EagleConfig, kernels: Kernels, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        size, eps = config.layers.hidden_size, config.layers.rms_norm_eps
        self._norm_before_residual = config.norm_before_residual
        self._join_columns = kernels.join_columns
        self.embedding_norm = RMSNorm(size, eps, kernels, dtype=dtype, device=device)
        self.feature_norm = RMSNorm(size, eps, kernels, dtype=dtype, device=device)

    def __call__(self, embedded: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of [T, hidden] -> what attention reads, [T, 2 * hidden], and the residual stream, [T, hidden]."""
        normed = self.feature_norm(feature)
        pair = self._join_columns(self.embedding_norm(embedded), normed)
        return pair, normed if self._norm_before_residual else feature

    def linears(self) -> tuple[Linear, ...]:
        return ()


class FirstLayer:
    """Where tokens and features meet. Layers after it, where a head has any, are the decoder's."""

    def __init__(
        self, config: EagleConfig, kernels: Kernels, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        layers = config.layers
        self.input: FusedInput | PairedInput
        if config.is_eagle3:
            self.input, input_size = PairedInput(config, kernels, dtype=dtype, device=device), 2 * layers.hidden_size
        else:
            self.input, input_size = FusedInput(config, kernels, dtype=dtype, device=device), layers.hidden_size
        self.attention = Attention(layers, 0, kernels, dtype=dtype, device=device, input_size=input_size)
        self.keys_and_values = self.attention.qkv.last(2)
        self._rotate_and_store = kernels.rotate_and_store
        self.mlp_norm = RMSNorm(layers.hidden_size, layers.rms_norm_eps, kernels, dtype=dtype, device=device)
        self.mlp = GatedMLP(layers, kernels, dtype=dtype, device=device)

    def __call__(
        self,
        embedded: torch.Tensor,  # [T, hidden]
        feature: torch.Tensor,  # [T, hidden]
        cos_T: torch.Tensor,
        sin_T: torch.Tensor,
        kv_layer: torch.Tensor,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """-> [T, hidden]; other arguments as in ``Attention``."""
        attended, residual = self.input(embedded, feature)
        after_attention = self.attention(attended, cos_T, sin_T, kv_layer, plan, residual)
        return self.mlp(self.mlp_norm(after_attention), after_attention)

    def store_keys_and_values(
        self,
        embedded: torch.Tensor,  # [T, hidden]
        feature: torch.Tensor,  # [T, hidden]
        cos_T: torch.Tensor,
        sin_T: torch.Tensor,
        kv_layer: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> None:
        """What a call writes, and nothing that attention or later layers would make of it."""
        attended, _ = self.input(embedded, feature)
        attention = self.attention
        heads = self.keys_and_values(attended).view(len(attended), -1, attention.head_dim)
        self._rotate_and_store(heads, cos_T, sin_T, kv_layer, slots_T, attention.head_norms)

    def linears(self) -> tuple[Linear, ...]:
        return (*self.input.linears(), self.keys_and_values, *self.attention.linears(), *self.mlp.linears())


class FeatureProjection:
    """Version 3: the streams captured from the target become one feature of the head's width."""

    def __init__(
        self, config: EagleConfig, kernels: Kernels, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        norm_sizes = {
            "none": (),
            "whole": (config.feature_size,),
            "each": (config.target_hidden_size,) * len(config.capture_layers),
        }[config.projection_norm]
        self.norms = [
            RMSNorm(size, config.layers.rms_norm_eps, kernels, dtype=dtype, device=device) for size in norm_sizes
        ]
        self.linear = Linear(config.feature_size, (config.layers.hidden_size,), bias=False, dtype=dtype, device=device)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """[T, feature_size] -> [T, hidden]."""
        if self.norms:
            streams = features.chunk(len(self.norms), dim=-1)
            features = torch.cat([norm(stream) for norm, stream in zip(self.norms, streams, strict=True)], dim=-1)
        return self.linear(features)


class EagleHead:
    """Pairs of token and feature to hidden states to logits over the draft vocabulary, with KV in a paged pool.

    What it shares with the target it takes from there: the embedding, and the output layer if it has none of its own.
    Weights are left uninitialised; see ``load.load_draft`` and ``random_draft.random_eagle``. Drafting several tokens::

        hidden = head.forward(tokens, head.project(features), positions, kv, plan)  # of what the target has computed
        draft = head.compute_logits(hidden[-1:]).argmax(-1)
        hidden = head.forward(head.target_ids(draft), head.next_feature(hidden[-1:]), positions[-1:] + 1, kv, next_plan)

    Slots written from the head's own features are written again, from the target's, when the target has these tokens.
    """

    def __init__(self, config: EagleConfig, target: Decoder, kernels: Kernels = TORCH_KERNELS) -> None:
        dtype, device = target.dtype, target.embedding.device
        layers = config.layers
        self.config = config
        self._dtype = dtype
        self._kernels = kernels
        self._compute_target_logits = target.compute_logits
        self._target_embedding = target.embedding.detach()
        self.embedding = None
        if config.has_embedding:
            weight = torch.empty(layers.vocab_size, layers.hidden_size, dtype=dtype, device=device)
            self.embedding = nn.Parameter(weight, requires_grad=False)
        self.projection = FeatureProjection(config, kernels, dtype=dtype, device=device) if config.is_eagle3 else None
        self.first_layer = FirstLayer(config, kernels, dtype=dtype, device=device)
        self.further_layers = [
            DecoderLayer(layers, index, kernels, dtype=dtype, device=device) for index in range(1, layers.num_layers)
        ]
        self.norm = self.lm_head = None
        if config.is_eagle3:
            self.norm = RMSNorm(layers.hidden_size, layers.rms_norm_eps, kernels, dtype=dtype, device=device)
        if config.has_lm_head:
            self.lm_head = Linear(
                layers.hidden_size, (config.draft_vocab_size,), bias=False, dtype=dtype, device=device
            )
        self.target_ids_D: torch.Tensor | None = None  # int64 [draft_vocab_size]; None: the vocabularies are the same
        self._rope = RotaryEmbedding(layers.rope, layers.head_dim, device, kernels)
        self._replayer = kernels.new_replayer()

    def prepare(self) -> None:
        """To be called when the weights are filled: linear layers bring theirs into the form that computes fastest."""
        of_layers = chain(self.first_layer.linears(), *(layer.linears() for layer in self.further_layers))
        of_ends = (self.projection.linear if self.projection else None, self.lm_head)
        for linear in (*of_layers, *filter(None, of_ends)):
            linear.prepare(self._kernels.linear_format)

    def layer_group(self, dtype: str) -> LayerGroup:
        """Shape of the head's KV with elements of ``dtype``, a key of ``kv_layout.DTYPE_BYTES``."""
        return self.config.kv_layer_group(dtype)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features [T, feature_size] -> [T, hidden], as ``forward`` takes them."""
        return features if self.projection is None else self.projection(features)

    def forward(
        self,
        token_ids_T: torch.Tensor,
        features: torch.Tensor,
        positions_T: torch.Tensor,
        kv: torch.Tensor,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        """Compute a step's pairs and write their KV.

        Args:
            token_ids_T: int64 [T], ids of the target's vocabulary.
            features: [T, hidden], of the token *before* each: from ``project`` or ``next_feature``; beside a
                token at position 0 any, with a plan whose ``first_key`` is 1.
            positions_T: int64 [T], position of each token in its sequence; it is rotated by one less.
            kv: the pool [num_blocks, L, 2, HKV, block_size, D] of the head's layer group, contiguous; written at
                ``plan.slots_T``.
            plan: of this step; a token's slot is that of its position.

        Returns:
            [T, hidden], from which the token after each is drafted.
        """
        tensors = plan.tensors
        (hidden,) = self._replayer.run(
            partial(self._compute_layers, token_ids_T, features, positions_T, kv, plan),
            StepInputs((token_ids_T, features, positions_T, *tensors.fixed), tensors.ragged),
            (kv.data_ptr(), kv.shape, plan.block_size_tokens, plan.first_key),
        )
        return hidden

    def write(
        self,
        token_ids_T: torch.Tensor,
        features: torch.Tensor,
        positions_T: torch.Tensor,
        kv: torch.Tensor,
        plan: AttentionPlan,
    ) -> None:
        """Write the KV that ``forward`` would write, bit for bit, of tokens whose hidden states nobody needs; arguments
        as there. Of a head of one layer nothing else is computed, and nothing of the plan is read but the slots."""
        if self.further_layers:
            self._compute_layers(token_ids_T, features, positions_T, kv, plan)
            return
        angles = self._rope.angles(positions_T, self._dtype, shift=-1)
        embedded = self._embed(token_ids_T)
        self.first_layer.store_keys_and_values(embedded, features, *angles, kv.unbind(1)[0], plan.slots_T)

    def _compute_layers(
        self,
        token_ids_T: torch.Tensor,
        features: torch.Tensor,
        positions_T: torch.Tensor,
        kv: torch.Tensor,
        plan: AttentionPlan,
    ) -> tuple[torch.Tensor]:
        angles = self._rope.angles(positions_T, self._dtype, shift=-1)
        first_kv_layer, *further_kv_layers = kv.unbind(1)
        hidden = self.first_layer(self._embed(token_ids_T), features, *angles, first_kv_layer, plan)
        for layer, kv_layer in zip(self.further_layers, further_kv_layers, strict=True):
            hidden = layer(hidden, *angles, kv_layer, plan)
        return (hidden,)

    def _embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        table = self._target_embedding if self.embedding is None else self.embedding
        return self._kernels.gather_rows(table, token_ids_T, self._dtype)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] of ``forward`` -> float32 [N, draft_vocab_size]."""
        normed = hidden if self.norm is None else self.norm(hidden)
        if self.lm_head is None:
            return self._compute_target_logits(normed)
        return self.lm_head(normed, dtype=torch.float32)

    def next_feature(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] of ``forward`` -> [N, hidden], the feature beside the token drafted from it."""
        return self.norm(hidden) if self.config.norm_output and self.norm is not None else hidden

    def target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """int64 ids of the draft vocabulary -> of the target's, of the same shape."""
        return draft_ids if self.target_ids_D is None else self.target_ids_D[draft_ids]
