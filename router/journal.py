"""What has been emitted of one answer: where another worker goes on, and what makes doubled tokens harmless."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec

from eagleray.core.block_hash import BlockHash, extend_block_hashes
from eagleray.core.messages import TokenOutput
from eagleray.core.request import Request, RequestSpec

# More tokens than this take milliseconds to hash: not on an event loop that serves others too.
INLINE_HASH_TOKENS: Final = 8192


class Journal:
    """Prompt and emitted tokens of one choice of one request. Survives every worker.

    Prefill and decode worker speak over two connections, so the second token may come before the first: it waits here.
    """

    def __init__(self, spec: RequestSpec, arrival_s: float) -> None:
        self.request = Request(spec, arrival_s)
        self.is_finished = False
        self._early: list[TokenOutput] = []
        self._hash_root: BlockHash | None = None

    @property
    def has_gap(self) -> bool:
        """Tokens have come whose predecessors have not."""
        return bool(self._early)

    def forget_early(self) -> None:
        """The attempt is over: what waits for a predecessor will come again from the next one."""
        self._early.clear()

    def take(self, output: TokenOutput) -> list[TokenOutput]:
        """What is new and in order now: the new part of ``output``, and what waited for it."""
        if not self._early and output.position == self.request.num_output_tokens and not self.is_finished:
            self._append(output)  # as nearly always
            return [output] if output.token_ids or output.finish_reason is not None else []
        self._early.append(output)
        ready: list[TokenOutput] = []
        while not self.is_finished:
            following = min(self._early, key=lambda early: early.position, default=None)
            if following is None or following.position > self.request.num_output_tokens:
                break
            self._early.remove(following)
            new = self._new_part(following)
            if new.token_ids or new.finish_reason is not None:
                self._append(new)
                ready.append(new)
        return ready

    async def block_hashes(self, root: BlockHash, block_size_tokens: int) -> Sequence[BlockHash]:
        """Of all full blocks that are known by now. Each is computed once, unless ``root`` changes."""
        request = self.request
        if root != self._hash_root:
            self._hash_root, request.block_hashes = root, []
        num_new_tokens = request.num_tokens - len(request.block_hashes) * block_size_tokens
        work = (request.block_hashes, root, request.token_ids, block_size_tokens)
        if num_new_tokens > INLINE_HASH_TOKENS:
            await asyncio.to_thread(extend_block_hashes, *work)
        else:
            extend_block_hashes(*work)
        return request.block_hashes

    def _append(self, output: TokenOutput) -> None:
        self.request.token_ids.extend(output.token_ids)
        self.is_finished = output.finish_reason is not None

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
