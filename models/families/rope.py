"""Rotary embedding settings from ``config.json``, as Hugging Face transformers reads them: ``rope_theta`` with
``rope_scaling`` (kind in ``rope_type``, long ago in ``type``), or all in ``rope_parameters`` since version 5."""

from __future__ import annotations

import math
from typing import Final

from eagleray.models.families.fields import Fields
from eagleray.models.model_config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)

_DEFAULT_THETA: Final = 10_000.0
_COMMON_NAMES: Final = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
# What each kind reads besides the common names, and what may stand beside it without an effect.
_NAMES: Final = {
    "default": frozenset({"factor", "original_max_position_embeddings"}),
    "linear": frozenset({"factor", "original_max_position_embeddings"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"}
        | {"beta_fast", "beta_slow", "truncate", "finetuned"}
    ),
}


def read_rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """Raises ``ConfigError`` for a kind or a parameter that we do not compute exactly."""
    _require_full_rotation(fields)
    section = fields.section("rope_scaling") or fields.section("rope_parameters")
    if section is None:
        return RopeConfig(fields.number("rope_theta", _DEFAULT_THETA))
    kind_name = "rope_type" if section.raw("rope_type") is not None else "type"
    kind = section.raw(kind_name) or "default"
    if not isinstance(kind, str) or kind not in _NAMES:
        raise section.error(kind_name, f"is not supported; supported: {', '.join(_NAMES)}")
    _require_full_rotation(section)
    for name in section.names():
        if name not in _COMMON_NAMES | _NAMES[kind]:
            raise section.error(name, f"is not known for {kind} scaling, so the result could not be exact")
    theta = section.number("rope_theta", fields.number("rope_theta", _DEFAULT_THETA))
    original = fields.optional_integer("original_max_position_embeddings") or section.integer(
        "original_max_position_embeddings", max_position_embeddings
    )
    return RopeConfig(theta, _read_scaling(section, kind, original, max_position_embeddings))


def _read_scaling(section: Fields, kind: str, original: int, max_position_embeddings: int) -> RopeScaling | None:
    if kind == "linear":
        return LinearScaling(section.number("factor"))
    if kind == "dynamic":
        # The length from which it would scale is max_position_embeddings, whatever else is written.
        return DynamicScaling(section.number("factor"), max_position_embeddings)
    if kind == "llama3":
        return Llama3Scaling(
            section.number("factor"), section.number("low_freq_factor"), section.number("high_freq_factor"), original
        )
    if kind == "yarn":
        factor = section.number("factor", max_position_embeddings / original)
        return YarnScaling(
            factor=factor,
            attention_factor=_yarn_attention_factor(section, factor),
            beta_fast=section.number("beta_fast", 32.0),
            beta_slow=section.number("beta_slow", 1.0),
            truncate=section.boolean("truncate", True),
            original_max_tokens=original,
        )
    return None


def _yarn_attention_factor(section: Fields, factor: float) -> float:
    if section.raw("attention_factor") is not None:
        return section.number("attention_factor")
    if section.raw("mscale") and section.raw("mscale_all_dim"):
        numerator = _yarn_magnitude(factor, section.number("mscale"))
        return numerator / _yarn_magnitude(factor, section.number("mscale_all_dim"))
    return _yarn_magnitude(factor, 1.0)


def _yarn_magnitude(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _require_full_rotation(fields: Fields) -> None:
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "rotating a part of each head is not supported")
