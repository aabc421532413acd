"""From outcomes to numbers. Latencies are of whole answers only; what failed is counted by kind."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from load import Answer, Outcome
from workload import ScheduledRequest, Workload, ideal_hits

PHASES: Final = ("queue", "prefill", "transfer", "decode", "network")
BEYOND: Final = "http and client"  # what the client waited beyond the server's account


@dataclass(frozen=True)
class Distribution:
    """Seconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Latencies:
    """None where nothing was measured."""

    send_delay: Distribution | None  # how much later than due the client sent
    time_to_first_token: Distribution | None  # from sending on, as all that follow
    time_per_output_token: Distribution | None  # after the first, the mean of a request
    inter_token_latency: Distribution | None  # every gap between two chunks of output
    end_to_end: Distribution | None


@dataclass(frozen=True)
class Throughput:
    duration_s: float  # from the first request sent to the end of the last whole answer
    prompt_tokens: int  # of whole answers, as the server counted them
    output_tokens: int
    requests_per_s_asked: float | None  # by the schedule; None: everything was due at once
    requests_per_s: float  # whole answers
    prompt_tokens_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True)
class PrefixHits:
    """Shares of prompt tokens. The ideal ones are of the same answers, with one unlimited cache for all requests."""

    measured: float  # cached_tokens of the usage
    ideal: float  # in whole KV blocks, and never the last token of a prompt
    ideal_unrounded: float  # by tokens


@dataclass(frozen=True)
class Routing:
    """Requests per worker, by the server's account; empty where it gives none."""

    prefill: Mapping[str, int]
    decode: Mapping[str, int]
    local_prefills: int  # prefilled where they were decoded
    retried: int  # took more than one attempt


@dataclass(frozen=True)
class Objective:
    """What a request must keep to be good, in seconds; None: anything will do."""

    time_to_first_token_s: float | None
    time_per_output_token_s: float | None

    def is_kept(self, request: ScheduledRequest, answer: Answer) -> bool:
        measured = (
            (time_to_first_token_s(answer), self.time_to_first_token_s),
            (time_per_output_token_s(request, answer), self.time_per_output_token_s),
        )
        return all(value <= limit for value, limit in measured if value is not None and limit is not None)


@dataclass(frozen=True)
class Goodput:
    """Whole answers that kept the objective (DistServe, OSDI 2024)."""

    objective: Objective
    share: float  # of all requests, those that failed included
    requests_per_s: float


@dataclass(frozen=True)
class Report:
    num_requests: int
    num_completed: int
    errors: Mapping[str, int]
    throughput: Throughput
    latencies_s: Latencies
    prefix_hits: PrefixHits | None  # None: nothing was completed
    phases_mean_s: Mapping[str, float]  # of a request: ``PHASES`` by the server's account, and ``BEYOND``
    routing: Routing
    goodput: Goodput | None  # None: no objective was given


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted ``values``, at least one, with linear interpolation between neighbours."""
    position = share * (len(values) - 1)
    below = int(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (position - below)


def distribution(values: Iterable[float]) -> Distribution | None:
    """None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.95, 0.99))
    return Distribution(statistics.fmean(ordered), p50, p95, p99)


def report(outcomes: Sequence[Outcome], workload: Workload, objective: Objective | None = None) -> Report:
    """``outcomes`` are those of all requests of ``workload``, in order."""
    answered = [(outcome.request, outcome.answer) for outcome in outcomes if outcome.answer is not None]
    answers = [answer for _, answer in answered]
    throughput = _throughput(outcomes, answers)
    return Report(
        num_requests=len(outcomes),
        num_completed=len(answers),
        errors=_counted(outcome.error for outcome in outcomes),
        throughput=throughput,
        latencies_s=Latencies(
            send_delay=distribution(
                outcome.sent_s - outcome.request.due_s for outcome in outcomes if outcome.sent_s is not None
            ),
            time_to_first_token=distribution(map(time_to_first_token_s, answers)),
            time_per_output_token=distribution(
                each for pair in answered if (each := time_per_output_token_s(*pair)) is not None
            ),
            inter_token_latency=distribution(_gaps(answers)),
            end_to_end=distribution(answer.latency_s for answer in answers),
        ),
        prefix_hits=_prefix_hits(outcomes, workload),
        phases_mean_s=_phases(answers),
        routing=_routing(answers),
        goodput=objective and _goodput(answered, len(outcomes), throughput.duration_s, objective),
    )


def _counted(names: Iterable[str | None]) -> dict[str, int]:
    """How often each occurs, by name; None is not counted."""
    return dict(sorted(Counter(name for name in names if name is not None).items()))


def _throughput(outcomes: Sequence[Outcome], answers: Sequence[Answer]) -> Throughput:
    sent_s = [outcome.sent_s for outcome in outcomes if outcome.sent_s is not None]
    duration_s = max(answer.end_s for answer in answers) - min(sent_s) if answers else 0.0
    per_s = 1 / duration_s if duration_s else 0.0
    prompt_tokens = sum(answer.usage.prompt_tokens for answer in answers)
    output_tokens = sum(answer.usage.completion_tokens for answer in answers)
    return Throughput(
        duration_s, prompt_tokens, output_tokens, _asked_rate(outcomes),
        len(answers) * per_s, prompt_tokens * per_s, output_tokens * per_s,
    )  # fmt: skip


def _asked_rate(outcomes: Sequence[Outcome]) -> float | None:
    """Over the time until the last is due: what would be achieved if answers took no time."""
    due_s = [outcome.request.due_s for outcome in outcomes]
    span_s = max(due_s) - min(due_s)
    return len(due_s) / span_s if span_s else None


def time_to_first_token_s(answer: Answer) -> float:
    return answer.chunk_times_s[0] - answer.sent_s


def time_per_output_token_s(request: ScheduledRequest, answer: Answer) -> float | None:
    """None for an answer of one token."""
    if request.num_output_tokens == 1:
        return None
    return (answer.chunk_times_s[-1] - answer.chunk_times_s[0]) / (request.num_output_tokens - 1)


def _goodput(
    answered: Sequence[tuple[ScheduledRequest, Answer]], num_requests: int, duration_s: float, objective: Objective
) -> Goodput:
    num_good = sum(objective.is_kept(request, answer) for request, answer in answered)
    return Goodput(objective, num_good / num_requests, num_good / duration_s if duration_s else 0.0)


def _gaps(answers: Sequence[Answer]) -> Iterator[float]:
    for answer in answers:
        yield from (later - earlier for earlier, later in pairwise(answer.chunk_times_s))


def _prefix_hits(outcomes: Sequence[Outcome], workload: Workload) -> PrefixHits | None:
    """The ideal cache has seen all requests, also those that failed."""
    ideal = ideal_hits(workload.requests, workload.scaling.block_tokens, workload.limits.kv_block_tokens)
    pairs = [(outcome.answer, hit) for outcome, hit in zip(outcomes, ideal, strict=True) if outcome.answer is not None]
    total = sum(answer.usage.prompt_tokens for answer, _ in pairs)
    if not total:
        return None
    return PrefixHits(
        measured=sum(answer.usage.cached_tokens for answer, _ in pairs) / total,
        ideal=sum(hit.cacheable_tokens for _, hit in pairs) / total,
        ideal_unrounded=sum(hit.shared_tokens for _, hit in pairs) / total,
    )


def _phases(answers: Sequence[Answer]) -> dict[str, float]:
    """They add up to the mean end-to-end latency of the answers that have an account."""
    accounts = [(answer.timing, answer.latency_s) for answer in answers if answer.timing]
    if not accounts:
        return {}
    means = {phase: statistics.fmean(timing[f"{phase}_s"] for timing, _ in accounts) for phase in PHASES}
    return {**means, BEYOND: statistics.fmean(latency_s - timing["total_s"] for timing, latency_s in accounts)}


def _routing(answers: Sequence[Answer]) -> Routing:
    accounts = [answer.timing for answer in answers if answer.timing]
    return Routing(
        prefill=_counted(account["prefill_worker"] for account in accounts),
        decode=_counted(account["decode_worker"] for account in accounts),
        local_prefills=sum(account["prefill_worker"] is None for account in accounts),
        retried=sum(account["attempts"] > 1 for account in accounts),
    )
