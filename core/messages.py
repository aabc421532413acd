"""What ingress and workers say to each other on their direct connection. Frames are in ``workers/channel.py``.

One connection per (worker, ingress). The ingress submits and aborts; the worker answers each submit once, then sends
one ``StepOutputs`` per engine step with the new tokens of all that ingress's requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import msgspec

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.block_hash import CachedBlock
from eagleray.core.kv_region import KVRegion
from eagleray.core.request import FinishReason, RequestSpec
from eagleray.core.snapshot import Role, WorkerSnapshot

PROTOCOL_VERSION = 4


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token and its best alternatives, from the raw logits (before temperature)."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most probable
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class RequestTiming(msgspec.Struct, frozen=True, omit_defaults=True):
    """Durations on the worker's own clock, sent with the first output of this worker for the request."""

    queue_s: float = 0.0  # accepted (or committed) -> first scheduled
    prefill_s: float = 0.0  # first scheduled -> first token sampled here
    transfer_s: float = 0.0  # accepted -> KV in and verified, less what the source needed to compute it


class TokenOutput(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """New tokens of one request from one step. Readers drop what they have by ``position``: doubles are harmless.

    Most of what lives in an ingress under load, and no part of any cycle: the garbage collector need not visit it.
    """

    request_id: str
    position: int  # index among the request's output tokens of the first token here
    choice: int = 0
    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()  # text that each token releases; held back while a stop string may still complete
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    num_cached_tokens: int | None = None  # on this worker's first output
    timing: RequestTiming | None = None  # on this worker's first output
    acceptance: Acceptance | None = None  # of these tokens' steps, where the worker guesses


def merged(outputs: Sequence[TokenOutput]) -> list[TokenOutput]:
    """Consecutive outputs of one choice, joined where that loses nothing: a worker's first one begins a new output."""
    groups: list[list[TokenOutput]] = []
    for output in outputs:
        begins = output.timing is not None or output.num_cached_tokens is not None or output.prompt_logprobs is not None
        if begins or not groups:
            groups.append([output])
        else:
            groups[-1].append(output)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups]


def _joined(outputs: list[TokenOutput]) -> TokenOutput:
    first, last = outputs[0], outputs[-1]
    scores = [score for output in outputs for score in output.logprobs or ()]
    return msgspec.structs.replace(
        first,
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        texts=tuple(text for output in outputs for text in output.texts),
        logprobs=tuple(scores) if scores else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        acceptance=total_acceptance(output.acceptance for output in outputs),
    )


# ---- ingress -> worker


class Hello(msgspec.Struct, frozen=True, tag=True):
    ingress_id: str
    protocol: int = PROTOCOL_VERSION


class Submit(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Compute a request. With ``pull_from``: reserve blocks first and take the KV from there as it gets ready.
    With ``hand_over``: sample one token, then keep the blocks for a reader until it has them."""

    spec: RequestSpec
    pull_from: KVRegion | None = None
    hand_over: bool = False


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """The ingress is there. A host that went away, or a process that was stopped, does not close its connections."""


# ---- worker -> ingress


class Welcome(msgspec.Struct, frozen=True, tag=True):
    worker_id: str
    role: Role
    epoch: int
    region: KVRegion
    max_model_tokens: int
    snapshot: WorkerSnapshot
    protocol: int = PROTOCOL_VERSION


class Accepted(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    num_cached_tokens: int = 0  # prefix blocks held already, in tokens: they need not travel


class RefusalKind(str, Enum):
    NO_ROOM = "no_room"  # now; another worker, or later
    INVALID = "invalid"  # never: the request itself
    INCOMPATIBLE = "incompatible"  # not as it was routed, and not the user's fault; another worker may take it
    DRAINING = "draining"  # this worker takes nothing new


class Refused(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    kind: RefusalKind
    reason: str


class StepOutputs(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    outputs: tuple[TokenOutput, ...] = ()
    snapshot: WorkerSnapshot | None = None


class CacheChanges(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """What became findable in the worker's prefix cache, and what is not any more; told in order. ``is_whole``: this
    begins with nothing, as on a new connection, where all that the worker holds follows."""

    stored: tuple[CachedBlock, ...] = ()
    evicted: tuple[CachedBlock, ...] = ()
    is_whole: bool = False


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker's engine cannot go on; the connection ends after this."""

    reason: str


ToWorker = Hello | Submit | Abort | Ping
ToIngress = Welcome | Accepted | Refused | StepOutputs | CacheChanges | Failed
