"""Who goes first: an order over requests. The first in order is admitted first, the last is preempted first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from eagleray.core.request import Request

# A smaller key goes first. Arrival time is always the last word, so that order is stable and nobody starves at a tie.
OrderKey = Callable[[Request], tuple[float, ...]]


def fcfs(request: Request) -> tuple[float, ...]:
    """First come, first served."""
    return (request.arrival_s,)


def priority(request: Request) -> tuple[float, ...]:
    """Smaller ``priority`` first, then first come."""
    return (request.spec.priority, request.arrival_s)


def shortest_prompt_first(request: Request) -> tuple[float, ...]:
    """Shortest prompt first: lowest mean time to first token, at the price of long prompts under load."""
    return (request.spec.num_prompt_tokens, request.arrival_s)


ORDERS: Final[dict[str, OrderKey]] = {
    "fcfs": fcfs,
    "priority": priority,
    "shortest_prompt_first": shortest_prompt_first,
}
