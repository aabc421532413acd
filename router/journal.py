"""What has been emitted of one answer: where another worker goes on, and what makes doubled tokens harmless."""

from __future__ import annotations

import msgspec

from eagleray.core.messages import TokenOutput
from eagleray.core.request import Request, RequestSpec


class Journal:
    """Prompt and emitted tokens of one choice of one request. Survives every worker.

    Prefill and decode worker speak over two connections, so the second token may come before the first: it waits here.
    """

    def __init__(self, spec: RequestSpec, arrival_s: float) -> None:
        self.request = Request(spec, arrival_s)
        self.is_finished = False
        self._early: list[TokenOutput] = []

    @property
    def has_gap(self) -> bool:
        """Tokens have come whose predecessors have not."""
        return bool(self._early)

    def forget_early(self) -> None:
        """The attempt is over: what waits for a predecessor will come again from the next one."""
        self._early.clear()

    def take(self, output: TokenOutput) -> list[TokenOutput]:
        """What is new and in order now: the new part of ``output``, and what waited for it."""
        self._early.append(output)
        ready: list[TokenOutput] = []
        while not self.is_finished:
            following = min(self._early, key=lambda early: early.position, default=None)
            if following is None or following.position > self.request.num_output_tokens:
                break
            self._early.remove(following)
            new = self._new_part(following)
            if new.token_ids or new.finish_reason is not None:
                self.request.token_ids.extend(new.token_ids)
                self.is_finished = new.finish_reason is not None
                ready.append(new)
        return ready

    def _new_part(self, output: TokenOutput) -> TokenOutput:
        known = self.request.num_output_tokens - output.position
        if known == 0:
            return output
        return msgspec.structs.replace(
            output,
            position=self.request.num_output_tokens,
            token_ids=output.token_ids[known:],
            texts=output.texts[known:],
            logprobs=None if output.logprobs is None else output.logprobs[known:],
        )
