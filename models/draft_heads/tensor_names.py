"""Names of tensors that tell of a draft head's checkpoint what it is. No torch: also for those who only look."""

from __future__ import annotations

from typing import Final

EMBEDDING: Final = "embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"
DRAFT_TO_TARGET: Final = "d2t"  # int64 [draft vocabulary]: what to add to a draft id
TARGET_TO_DRAFT: Final = "t2d"  # bool [target vocabulary]: which ids the draft has; follows from the other
ONLY_IN_TRAINING: Final = frozenset({TARGET_TO_DRAFT, "verifier_norm.weight", "verifier_lm_head.weight"})
