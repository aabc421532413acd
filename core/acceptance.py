"""What came of guessing tokens ahead: one noun for a request, a step, a worker and the cluster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import msgspec


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """Counts that add up. A step counts once for each request that decoded in it.

    Positions count tokens ahead, from the first guess on. A tree has several guesses at a position; at most one of them
    comes true. Drafts differ in length, so each position has its own number of drafts that reached so far.
    """

    num_steps: int = 0  # of decoding, with or without guesses
    num_draft_tokens: int = 0  # guesses that were verified
    num_accepted_tokens: int = 0  # of those, the ones that came true
    drafts_per_position: tuple[int, ...] = ()  # drafts that had a guess there
    accepted_per_position: tuple[int, ...] = ()  # of those, the ones of which a guess there came true
    verify_s: float = 0.0  # computing and sampling, of these steps; what requests share counts whole for each of them
    draft_s: float = 0.0  # guessing, of these steps

    @classmethod
    def of_step(
        cls, num_draft_tokens: int, depth: int, num_accepted: int, verify_s: float, draft_s: float
    ) -> Acceptance:
        """Of one request in one step: its draft reached ``depth`` tokens ahead (0: it had none)."""
        return cls(
            num_steps=1,
            num_draft_tokens=num_draft_tokens,
            num_accepted_tokens=num_accepted,
            drafts_per_position=(1,) * depth,
            accepted_per_position=(1,) * num_accepted,
            verify_s=verify_s,
            draft_s=draft_s,
        )

    @property
    def num_drafts(self) -> int:
        """Steps that had guesses to verify."""
        return self.drafts_per_position[0] if self.drafts_per_position else 0

    @property
    def tokens_per_step(self) -> float:
        """What a request gets of a step on average; 1 without any."""
        return 1.0 + self.num_accepted_tokens / self.num_steps if self.num_steps else 1.0

    @property
    def acceptance_length(self) -> float:
        """Tokens of a step that verified guesses: those that came true and the one after them; 1 without any."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def rate_per_position(self) -> tuple[float, ...]:
        """Share of the drafts that reached a position of which everything up to it came true."""
        return tuple(
            accepted / drafts
            for drafts, accepted in zip_longest(self.drafts_per_position, self.accepted_per_position, fillvalue=0)
        )


def total_acceptance(parts: Iterable[Acceptance | None]) -> Acceptance | None:
    """The sum; None if there is nothing to add up."""
    known = [part for part in parts if part is not None]
    if len(known) < 2:
        return known[0] if known else None
    return Acceptance(
        num_steps=sum(part.num_steps for part in known),
        num_draft_tokens=sum(part.num_draft_tokens for part in known),
        num_accepted_tokens=sum(part.num_accepted_tokens for part in known),
        drafts_per_position=_added([part.drafts_per_position for part in known]),
        accepted_per_position=_added([part.accepted_per_position for part in known]),
        verify_s=sum(part.verify_s for part in known),
        draft_s=sum(part.draft_s for part in known),
    )


def _added(counts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip_longest(*counts, fillvalue=0)))
