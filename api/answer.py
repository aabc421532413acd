"""An answer under way: the generations of one HTTP request, and what each choice has so far."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final

from eagleray.api.errors import GenerationFailed
from eagleray.api.prepared import AnswerOptions, PreparedRequest, TokenizedPrompt
from eagleray.api.report import account_report
from eagleray.api.response_types import Finish, Usage
from eagleray.core.messages import TokenLogprobs, TokenOutput
from eagleray.router.service import Generation, GenerationService

_MERGE_AHEAD: Final = 64  # outputs read ahead of the client, over all prompts of a batch


class Choice:
    """One choice of the answer."""

    def __init__(self, index: int, prompt: TokenizedPrompt, options: AnswerOptions) -> None:
        self.index = index  # in the response: prompts in order, each with its n choices
        self.prompt = prompt
        self.texts: list[str] = [prompt.text] if options.echo else []
        self.scores: list[TokenLogprobs] = []
        self.prompt_scores: Sequence[TokenLogprobs | None] | None = None
        self.num_tokens = 0
        self.num_cached_tokens: int | None = None
        self.finish_reason: Finish | None = None
        self.stop_reason: str | int | None = None
        self._show_output = options.show_output

    def add(self, output: TokenOutput) -> None:
        """Take the next output."""
        if output.prompt_logprobs is not None:
            self.prompt_scores = output.prompt_logprobs
        if self.num_cached_tokens is None:  # a later worker counts what was handed over to it: not a cache hit
            self.num_cached_tokens = output.num_cached_tokens
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason.value if self._show_output else "length"
            self.stop_reason = output.stop_reason if self._show_output else None
        if self._show_output:
            self.texts.extend(output.texts)
            self.scores.extend(output.logprobs or ())
            self.num_tokens += len(output.token_ids)

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Answer:
    """Started on creation; ``aclose`` ends it whatever its state."""

    def __init__(self, service: GenerationService, request: PreparedRequest) -> None:
        self.request = request
        n = request.sampling.n
        self.choices = [
            Choice(rank * n + number, prompt, request.options)
            for rank, prompt in enumerate(request.prompts)
            for number in range(n)
        ]
        self._generations = [service.generate(spec, request.already_s) for spec in request.specs]
        self._updates = self._read()

    def updates(self) -> AsyncGenerator[tuple[Choice, TokenOutput], None]:
        """Outputs as they come, already added to their choice. One reader.

        Raises ``GenerationFailed`` and what the service raises.
        """
        return self._updates

    async def finished(self) -> None:
        """Read everything."""
        async for _ in self._updates:
            pass

    async def aclose(self) -> None:
        """Abort what still runs. Not while somebody awaits an update."""
        await self._updates.aclose()
        await asyncio.gather(*(generation.aclose() for generation in self._generations))

    def usage(self) -> Usage:
        """So far. A prompt counts once, however many choices it has."""
        n = self.request.sampling.n
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.request.prompts)
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        cached = [
            min(choice.num_cached_tokens or 0, len(choice.prompt.token_ids))
            for choice in self.choices[::n]  # its siblings find the prompt in the cache by construction
        ]
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(cached)},
        }

    def timing(self) -> dict[str, Any] | list[dict[str, Any] | None] | None:
        """After the end: one account, or one per prompt of a batch."""
        accounts = [account_report(generation.account) for generation in self._generations]
        return accounts[0] if len(accounts) == 1 else accounts

    async def _read(self) -> AsyncGenerator[tuple[Choice, TokenOutput], None]:
        n = self.request.sampling.n
        async with aclosing(_merged(self._generations)) as outputs:
            async for rank, output in outputs:
                choice = self.choices[rank * n + output.choice]
                choice.add(output)
                yield choice, output
        if any(choice.finish_reason is None for choice in self.choices):
            raise GenerationFailed("The answer ended before all of it was there.")


async def _merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, TokenOutput], None]:
    """``(index of the generation, output)`` of all, as they come."""
    if len(generations) == 1:
        async for output in generations[0]:
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, TokenOutput] | Exception | None] = asyncio.Queue(_MERGE_AHEAD)

    async def pump(index: int, generation: Generation) -> None:
        try:
            async for output in generation:
                await queue.put((index, output))
            await queue.put(None)
        except Exception as error:  # handed to the reader
            await queue.put(error)

    pumps = [asyncio.create_task(pump(index, generation)) for index, generation in enumerate(generations)]
    try:
        num_running = len(pumps)
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
