"""What ingress and workers say to each other arrives as it was sent, also from a version that says more."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from eagleray.core.acceptance import Acceptance, total_acceptance
from eagleray.core.block_hash import BlockHash, CachedBlock
from eagleray.core.kv_layout import KVLayout, LayerGroup
from eagleray.core.kv_region import KVRegion, SharedMemoryRef
from eagleray.core.messages import (
    Abort,
    Accepted,
    CacheChanges,
    Failed,
    Hello,
    Ping,
    RefusalKind,
    Refused,
    RequestTiming,
    StepOutputs,
    Submit,
    ToIngress,
    TokenLogprobs,
    TokenOutput,
    ToWorker,
    Welcome,
    merged,
)
from eagleray.core.request import FinishReason, RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.core.snapshot import Role, WorkerSnapshot

LAYOUT = KVLayout(16, (LayerGroup("target", 2, 2, 16, "float32"),))
REGION = KVRegion("w", 3, LAYOUT, 8, (4096,), "127.0.0.1:1", "model", SharedMemoryRef("host", 5, 6, 7, b"\x00\xff"))
SNAPSHOT = WorkerSnapshot(worker_id="w", role=Role.PREFILL, epoch=3, blocks_total=8, decode_step_s=0.25)
SAMPLING = SamplingParams(n=2, stop=("x",), logit_bias={1: -100.0}, seed=-5)
SPEC = RequestSpec(request_id="a", token_ids=(1, 2**40), num_prompt_tokens=1, sampling=SAMPLING, choice=1)
OUTPUT = TokenOutput(
    "a", 4, 1, (5, 6), ("é", ""),
    logprobs=(TokenLogprobs(5, -0.5, 1, (5, 9), (-0.5, -1.5)), TokenLogprobs(6, -2.0, 3)),
    prompt_logprobs=(None, TokenLogprobs(2, -0.25, 1)),
    finish_reason=FinishReason.STOP, stop_reason=6, num_cached_tokens=16, timing=RequestTiming(0.5, 0.25, 0.125),
    acceptance=Acceptance.of_step(3, 3, 1, 0.5, 0.25),
)  # fmt: skip

TO_WORKER: list[Any] = [
    Hello("ingress"), Submit(SPEC), Submit(SPEC, pull_from=REGION), Submit(SPEC, hand_over=True), Abort("a"),
    Ping(),
]  # fmt: skip
TO_INGRESS: list[Any] = [
    Welcome("w", Role.PREFILL, 3, REGION, 512, SNAPSHOT),
    Accepted("a", 32),
    *(Refused("a", kind, "why") for kind in RefusalKind),
    StepOutputs((OUTPUT, TokenOutput("b", 0)), SNAPSHOT),
    StepOutputs(),
    CacheChanges((CachedBlock(BlockHash(b"root"), BlockHash(b"\xff\x00")),), (), is_whole=True),
    CacheChanges((), (CachedBlock(BlockHash(b"root"), BlockHash(b"gone")),)),
    Failed("the device is gone"),
    StepOutputs((TokenOutput("a", 1, stop_reason="END"),)),
]


def named(message: Any) -> str:
    return type(message).__name__


@pytest.mark.parametrize("message", TO_WORKER, ids=named)
def test_a_message_to_a_worker_arrives_as_it_was_sent(message: Any) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToWorker) == message


@pytest.mark.parametrize("message", TO_INGRESS, ids=named)
def test_a_message_to_an_ingress_arrives_as_it_was_sent(message: Any) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToIngress) == message


@pytest.mark.parametrize("message", [*TO_WORKER, *TO_INGRESS], ids=named)
def test_a_field_that_a_newer_version_adds_is_ignored(message: Any) -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    newer = msgspec.msgpack.encode(fields | {"added_later": [1, 2]})
    direction = ToWorker if message in TO_WORKER else ToIngress
    assert msgspec.msgpack.decode(newer, type=direction) == message


@pytest.mark.parametrize("message", TO_INGRESS, ids=named)
def test_a_worker_takes_no_message_that_is_meant_for_an_ingress(message: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToWorker)


def test_a_message_without_a_field_that_it_must_have_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="request_id"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"type": "Abort"}), type=ToWorker)


def test_a_step_of_one_token_is_a_small_message() -> None:
    """Defaults do not travel: a decoding request costs little more than its id, its token and its text."""
    assert len(msgspec.msgpack.encode(StepOutputs((TokenOutput("a", 1, token_ids=(5,), texts=("b",)),)))) < 90


def test_consecutive_outputs_are_joined_and_nothing_of_them_is_lost() -> None:
    scores = [TokenLogprobs(token_id, -1.0, 1) for token_id in range(3)]
    outputs = [
        TokenOutput("a", position, token_ids=(position,), texts=(str(position),), logprobs=(scores[position],))
        for position in range(3)
    ]
    last = msgspec.structs.replace(outputs[-1], finish_reason=FinishReason.STOP, stop_reason="2")
    [joined] = merged([*outputs[:-1], last])
    assert joined == TokenOutput(
        "a", 0, token_ids=(0, 1, 2), texts=("0", "1", "2"), logprobs=tuple(scores),
        finish_reason=FinishReason.STOP, stop_reason="2",
    )  # fmt: skip


def test_what_only_a_workers_first_output_tells_begins_an_output_of_its_own() -> None:
    first = TokenOutput("a", 0, token_ids=(5,), timing=RequestTiming(), num_cached_tokens=3)
    other_worker = TokenOutput("a", 1, token_ids=(6,), timing=RequestTiming(queue_s=1.0))
    assert merged([first, other_worker]) == [first, other_worker]
    assert merged([]) == []


def test_what_came_of_guesses_adds_up_when_outputs_are_joined() -> None:
    accepted = [Acceptance.of_step(3, 3, count, 0.5, 0.25) for count in (2, 0)]
    first, second = (
        TokenOutput("a", 4, token_ids=(5, 6, 7), acceptance=accepted[0]),
        TokenOutput("a", 7, token_ids=(8,)),
    )
    [joined] = merged([first, msgspec.structs.replace(second, acceptance=accepted[1])])
    assert joined.acceptance == total_acceptance(accepted)
    assert merged([second])[0].acceptance is None
