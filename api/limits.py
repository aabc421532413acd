"""Bounds on what a request may ask for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from eagleray.core.errors import InvalidRequest

MAX_CHOICES_PER_REQUEST: Final = 1024  # prompts times n: what one HTTP request may start at once
INLINE_BODY_BYTES: Final = 16 * 2**10  # a body up to this size is templated and tokenised on the event loop


def resolve_max_tokens(
    asked: int | None, default: int | None, num_prompt_tokens: int, max_model_tokens: int, field: str
) -> int:
    """Tokens that the output may have: what was ``asked``, else ``default`` or what fits (None: all that fits).

    Raises ``InvalidRequest`` with the code ``context_length_exceeded`` when prompt and output do not fit.
    """
    room = max_model_tokens - num_prompt_tokens
    if room < 1 or (asked or 0) > room:
        output = "" if asked is None else f" and {asked} tokens of output ({field})"
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_tokens} tokens, but the prompt has {num_prompt_tokens} "
            f"tokens{output}. Shorten the prompt or ask for less.",
            param=field if room > 0 else "prompt",
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    return room if default is None else min(default, room)


def check_num_choices(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_CHOICES_PER_REQUEST:
        message = f"prompt: {num_prompts} prompts times n={n} is more than {MAX_CHOICES_PER_REQUEST} in one request."
        raise InvalidRequest(message, param="prompt")


def check_token_ids(token_ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises ``InvalidRequest`` naming the first id that the vocabulary does not have."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            message = f"{param}: token id {token_id} is not in the vocabulary (0 to {vocab_size - 1})."
            raise InvalidRequest(message, param=param)
