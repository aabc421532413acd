"""What has been emitted of one answer: where another worker goes on, and what makes doubled tokens harmless."""

from __future__ import annotations

import msgspec

from eagleray.core.errors import EagleRayError
from eagleray.core.messages import TokenOutput
from eagleray.core.request import Request, RequestSpec


class EmissionGap(EagleRayError):
    """A worker sent a token that does not follow what was emitted: a bug of ours, never passed on as text."""


class Journal:
    """Prompt and emitted tokens of one choice of one request. Survives every worker."""

    def __init__(self, spec: RequestSpec, arrival_s: float) -> None:
        self.request = Request(spec, arrival_s)
        self.is_finished = False

    def take(self, output: TokenOutput) -> TokenOutput | None:
        """The part of ``output`` that is new, or None when all of it was emitted before.

        Raises ``EmissionGap`` when tokens are missing between what is known and ``output``.
        """
        known = self.request.num_output_tokens - output.position
        if known < 0:
            raise EmissionGap(f"request {output.request_id}: token {output.position} came, {-known} before it did not")
        if self.is_finished or (known >= len(output.token_ids) and output.finish_reason is None):
            return None
        self.request.token_ids.extend(output.token_ids[known:])
        self.is_finished = output.finish_reason is not None
        if known == 0:
            return output
        return msgspec.structs.replace(
            output,
            position=output.position + known,
            token_ids=output.token_ids[known:],
            texts=output.texts[known:],
            logprobs=None if output.logprobs is None else output.logprobs[known:],
        )
