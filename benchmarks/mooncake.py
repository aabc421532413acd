"""Request traces in Mooncake's format: read from a file, or made up with the statistics of a published one.

The format, one JSON object per line: ``timestamp`` (ms since the start), ``input_length`` and ``output_length``
(tokens), and ``hash_ids``, one per block of 512 input tokens, the last block perhaps short. Equal ids mean an equal
block after an equal prefix. (Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST 2025.)
"""

from __future__ import annotations

import bisect
import gzip
import itertools
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

TRACE_BLOCK_TOKENS: Final = 512


class TraceError(ValueError):
    """A trace that cannot be replayed; the text names the place and what was expected there."""


class TraceRequest(msgspec.Struct, frozen=True):
    """One row. The field names are the format's; ``timestamp`` is in milliseconds."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_trace(path: Path, start: int = 0, count: int | None = None) -> list[TraceRequest]:
    """``count`` rows (None: all there are) from row ``start`` of a .jsonl or .jsonl.gz file.

    Raises ``TraceError`` for a file that cannot be read, a malformed row and an empty slice.
    """
    stop = None if count is None else start + count
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            numbered = itertools.islice(enumerate(lines, 1), start, stop)
            rows = [_parse_row(path, number, line) for number, line in numbered if line.strip()]
    except OSError as error:
        raise TraceError(f"trace {path}: cannot be read: {error}") from None
    if not rows:
        raise TraceError(f"trace {path}: has no row from {start} on; choose a smaller --start")
    return rows


def _parse_row(path: Path, number: int, line: bytes) -> TraceRequest:
    try:
        row = msgspec.json.decode(line, type=TraceRequest)
    except msgspec.MsgspecError as error:
        raise TraceError(f"trace {path}, line {number}: {error}; Mooncake's format is expected") from None
    if row.input_length < 1 or row.output_length < 1 or len(row.hash_ids) != _num_blocks(row.input_length):
        raise TraceError(
            f"trace {path}, line {number}: input_length={row.input_length}, output_length={row.output_length} and "
            f"{len(row.hash_ids)} hash_ids do not go together: one id per {TRACE_BLOCK_TOKENS} input tokens is expected"
        )
    return row


def _num_blocks(num_tokens: int) -> int:
    return math.ceil(num_tokens / TRACE_BLOCK_TOKENS)


# What follows is the conversation trace that came with the paper (12,031 requests in an hour), as quantiles.
Quantiles = Sequence[tuple[float, float]]

REQUESTS_PER_S: Final = 3.4
TIMESTAMP_STEP_MS: Final = 3000  # arrivals were recorded in steps of this size: they come in bursts of about ten
INPUT_TOKENS: Final = (
    (0.0, 891), (0.1, 964), (0.25, 2306), (0.5, 6909), (0.75, 15368), (0.9, 27367), (0.99, 85401), (1.0, 126195),
)  # fmt: skip
OUTPUT_TOKENS: Final = (
    (0.0, 1), (0.1, 24), (0.25, 156), (0.5, 350), (0.75, 472), (0.9, 597), (0.99, 1120), (1.0, 2000),
)  # fmt: skip
# Of a request that goes on with an earlier conversation: the share of its blocks that the earlier prompt had.
CONTINUED_SHARE: Final = (
    (0.0, 0.015), (0.01, 0.058), (0.1, 0.286), (0.25, 0.524), (0.5, 0.8), (0.75, 0.931), (0.9, 0.97), (1.0, 1.0),
)  # fmt: skip
# Long prompts are long because they go on: a prompt at quantile u of the lengths does so with the probability
# SCALE * u**EXPONENT. 39% of all prompts do; the exponent is fitted to the trace's prefix-hit ratio of 0.366.
CONTINUES_EXPONENT: Final = 0.45
CONTINUES_SCALE: Final = 0.387 * (1 + CONTINUES_EXPONENT)
CONTINUED_WITHIN_REQUESTS: Final = 2000  # ten minutes: 90% of the continued prompts came back sooner


def generate_trace(count: int, seed: int) -> list[TraceRequest]:
    """``count`` requests like the published conversation trace: lengths, bursts, conversations, one system prompt.

    The same seed gives the same requests, and a larger count only appends.
    """
    rng = random.Random(seed)
    arrivals_ms = _arrivals_ms(rng)
    fresh_ids = itertools.count(1)  # block 0 is the system prompt that all requests share
    recent = _RecentPrompts(CONTINUED_WITHIN_REQUESTS)
    rows = []
    for _ in range(count):
        quantile = rng.random()
        input_length = round(value_at(INPUT_TOKENS, quantile))
        num_blocks = _num_blocks(input_length)
        prefix: tuple[int, ...] = (0,)
        share = value_at(CONTINUED_SHARE, rng.random())
        if rng.random() < CONTINUES_SCALE * quantile**CONTINUES_EXPONENT:
            prefix = recent.prefix(max(1, round(share * num_blocks))) or prefix
        hash_ids = prefix + tuple(itertools.islice(fresh_ids, num_blocks - len(prefix)))
        recent.add(hash_ids)
        output_length = round(value_at(OUTPUT_TOKENS, rng.random()))
        rows.append(TraceRequest(next(arrivals_ms), input_length, output_length, hash_ids))
    return rows


def value_at(quantiles: Quantiles, share: float) -> float:
    """The value that ``share`` of a distribution lies below, between known quantiles on a logarithmic scale."""
    upper = min(bisect.bisect_right(quantiles, (share, math.inf)), len(quantiles) - 1)
    (low_share, low), (high_share, high) = quantiles[upper - 1], quantiles[upper]
    return low * math.exp(math.log(high / low) * (share - low_share) / (high_share - low_share))


def _arrivals_ms(rng: random.Random) -> Iterator[int]:
    """A Poisson process, recorded in steps."""
    now_ms = 0.0
    while True:
        yield int(now_ms // TIMESTAMP_STEP_MS) * TIMESTAMP_STEP_MS
        now_ms += rng.expovariate(REQUESTS_PER_S) * 1000


class _RecentPrompts:
    """The last ``capacity`` prompts, found by length: a conversation goes on with most of what it had."""

    def __init__(self, capacity: int) -> None:
        self._in_order: deque[tuple[int, ...]] = deque()
        self._by_length: list[tuple[int, tuple[int, ...]]] = []
        self._capacity = capacity

    def add(self, hash_ids: tuple[int, ...]) -> None:
        self._in_order.append(hash_ids)
        bisect.insort(self._by_length, (len(hash_ids), hash_ids))
        if len(self._in_order) > self._capacity:
            oldest = self._in_order.popleft()
            del self._by_length[bisect.bisect_left(self._by_length, (len(oldest), oldest))]

    def prefix(self, num_blocks: int) -> tuple[int, ...]:
        """The first ``num_blocks`` blocks of the shortest prompt that has as many; of the longest, if none has."""
        if not self._by_length:
            return ()
        at = min(bisect.bisect_left(self._by_length, (num_blocks,)), len(self._by_length) - 1)
        return self._by_length[at][1][:num_blocks]
