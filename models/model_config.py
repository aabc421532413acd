"""Architecture as a value: everything the decoder needs to know, whatever family a checkpoint comes from."""

from __future__ import annotations

from dataclasses import dataclass

from eagleray.core.errors import ConfigError
from eagleray.core.kv_layout import LayerGroup


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by ``factor`` (Chen et al., arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """NTK scaling that starts beyond the original length and changes with the length reached. Cached keys would have to
    be turned again at every token, so we serve it up to the original length only, where it changes nothing."""

    factor: float
    original_max_tokens: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies divided by ``factor``, high ones kept, smooth in between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_tokens: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Interpolation by wavelength, and a factor on cosine and sine (Peng et al., arXiv 2309.00071)."""

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool  # round the range of dimensions outwards to whole numbers
    original_max_tokens: int


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding over all of ``head_dim``."""

    theta: float = 10_000.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: RMS norm, grouped-query attention with rotary embedding, gated SiLU MLP."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    sliding_window: tuple[int | None, ...]  # per layer: tokens that a token sees, itself included; None: all before it
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm over head_dim of query and key, before the rotation
    dtype: str = "float32"  # of the checkpoint: a key of ``kv_layout.DTYPE_BYTES``
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def max_model_tokens(self) -> int:
        """Longest sequence, prompt and output, that the checkpoint's position embedding is made for."""
        scaling = self.rope.scaling
        if isinstance(scaling, DynamicScaling):
            return scaling.original_max_tokens
        if isinstance(scaling, LinearScaling):
            return int(self.max_position_embeddings * scaling.factor)
        if isinstance(scaling, YarnScaling):
            return max(self.max_position_embeddings, int(scaling.original_max_tokens * scaling.factor))
        return self.max_position_embeddings

    def resolve_max_model_tokens(self, requested: int | None) -> int:
        """The user's limit, or the model's own. Raises ``ConfigError`` if the user asks for more than the model has."""
        limit = self.max_model_tokens
        if requested is None:
            return limit
        if requested > limit:
            dynamic = isinstance(self.rope.scaling, DynamicScaling)
            why = (
                "beyond it dynamic rope scaling would change keys already cached" if dynamic else "positions end there"
            )
            raise ConfigError(
                "model.max_model_tokens",
                requested,
                f"this model serves up to {limit} tokens: {why}; lower it or leave it out",
            )
        return requested

    def resolve_dtype(self, requested: str, device: str) -> str:
        """What the user chose. Else (``auto``) the checkpoint's own, but float32 on a CPU: only in float32 outputs are
        identical, up to near-ties, however a request was batched and chunked.

        That has its price where a CPU has instructions for bfloat16: prompts are slower, and decoding from about four
        rows on (``benchmarks/results/2026-11-29-epyc-2-cores/limits.md``, *Guessing*). One that has none multiplies in
        float32 either way (``2026-11-30-zen3-2-cores/limits.md``). KV takes twice the bytes on both."""
        if requested != "auto":
            return requested
        return "float32" if device == "cpu" else self.dtype

    def kv_layer_group(self, dtype: str, name: str = "target") -> LayerGroup:
        """What one block of this model's KV looks like with elements of ``dtype``, a key of ``DTYPE_BYTES``."""
        return LayerGroup(name, self.num_layers, self.num_kv_heads, self.head_dim, dtype)
