"""EAGLE-3's head for training: dense and differentiable, with the tensor names of the published format.

The network's equations are those of ``models/draft_heads/eagle.py``. Training-time test (Li et al., arXiv 2503.01840):
the head is trained on its own outputs as it meets them when it drafts. With features g of the target and its
distributions p, the chain that starts at token s computes at its step j

    pair (token s + 1 + j, g_s or, from step 1 on, the head's output of step j - 1), rotated by s + j,

attends to the pairs of step 0 up to s and to its own of the steps since, and is taught p of token s + 2 + j.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from eagleray.models.draft_heads.draft_config import EagleConfig
from eagleray.models.draft_heads.tensor_names import LM_HEAD
from eagleray.models.rope import RotaryEmbedding
from eagleray.training.lesson import Lesson
from eagleray.training.trainee import parameters_from


@dataclass(frozen=True, slots=True)
class _Seen:
    """Keys and values that chains attend to, one entry per step: [B, HKV, S, D]."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class Eagle3Trainee:
    """Implements ``Trainee``.

    Args:
        config: of the head, which reads the target's embedding.
        weights: to start from, by name; see ``weight_names.eagle_views``.
        embedding: [vocabulary, hidden] of the target.
        num_guesses: of each chain.
    """

    def __init__(self, config: EagleConfig, weights: dict[str, Tensor], embedding: Tensor, num_guesses: int) -> None:
        self.config = config
        self.weights = parameters_from(weights)
        self.output_layers = frozenset({LM_HEAD})
        self.num_guesses = num_guesses
        self._embedding = embedding.detach().float()
        self._rope = RotaryEmbedding(config.layers.rope, config.layers.head_dim, "cpu")

    def guess(self, lesson: Lesson) -> Iterator[Tensor]:
        """Logits [R, V] for the chains of depths 1, 2, ...: each follows the document, whatever it guesses."""
        features_BSC = linear(lesson.features_BTC[:, :-1], self._weight("fc"))
        embedded_BTC = self._embedding[lesson.token_ids_BT]
        seen = _Seen()
        for step in range(self.num_guesses):
            # The last chains have no token left to pair at this step: they repeat an earlier one, and are not read.
            paired_BSC = embedded_BTC[:, 1:].roll(-step, dims=1)
            hidden_BSC = self._layer(paired_BSC, features_BSC, step, seen)
            normed_BSC = self._norm(hidden_BSC, "norm")
            yield linear(normed_BSC[lesson.chains(step + 1)], self._weight("lm_head"))
            features_BSC = normed_BSC if self.config.norm_output else hidden_BSC

    def _layer(self, embedded_BSC: Tensor, features_BSC: Tensor, step: int, seen: _Seen) -> Tensor:
        normed = self._norm(features_BSC, "layers.0.hidden_norm")
        pair = torch.cat((self._norm(embedded_BSC, "layers.0.input_layernorm"), normed), dim=-1)
        residual = normed if self.config.norm_before_residual else features_BSC
        hidden = residual + self._attention(pair, step, seen)
        normed = self._norm(hidden, "layers.0.post_attention_layernorm")
        gate, up = (linear(normed, self._weight(f"layers.0.mlp.{name}_proj")) for name in ("gate", "up"))
        return hidden + linear(silu(gate) * up, self._weight("layers.0.mlp.down_proj"))

    def _attention(self, pair_BSP: Tensor, step: int, seen: _Seen) -> Tensor:
        """[B, S, 2 * hidden] -> [B, S, hidden]; adds this step's keys and values to what is seen."""
        layers = self.config.layers
        query, key, value = (
            linear(pair_BSP, self._weight(f"layers.0.self_attn.{name}_proj"))
            .view(*pair_BSP.shape[:2], -1, layers.head_dim)
            .transpose(1, 2)
            for name in "qkv"
        )
        cos_SD, sin_SD = self._rope.angles(torch.arange(pair_BSP.shape[1]) + step, query.dtype)
        group_size = layers.num_heads // layers.num_kv_heads
        seen.keys.append(_rotate(key, cos_SD, sin_SD).repeat_interleave(group_size, dim=1))
        seen.values.append(value.repeat_interleave(group_size, dim=1))
        context = _attend(_rotate(query, cos_SD, sin_SD) * layers.head_dim**-0.5, seen)
        return linear(context.transpose(1, 2).flatten(2), self._weight("layers.0.self_attn.o_proj"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weight(name)
        return rms_norm(x.float(), weight.shape, weight, self.config.layers.rms_norm_eps)

    def _weight(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"]


def _attend(query_BHSD: Tensor, seen: _Seen) -> Tensor:
    """[B, H, S, D]: chain s sees the pairs of step 0 up to s, and of each later step its own."""
    length = query_BHSD.shape[2]
    later = torch.full((length, length), float("-inf"), dtype=query_BHSD.dtype).triu(1)
    certain = query_BHSD @ seen.keys[0].transpose(-1, -2) + later
    own = [(query_BHSD * key).sum(-1, keepdim=True) for key in seen.keys[1:]]
    shares = torch.cat((certain, *own), dim=-1).softmax(dim=-1)
    context = shares[..., :length] @ seen.values[0]
    for index, own_value in enumerate(seen.values[1:]):
        context = context + shares[..., length + index, None] * own_value
    return context


def _rotate(x_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * cos_SD + torch.cat((-second, first), dim=-1) * sin_SD
