"""Blocks of a request that is being handed over: whenever it is aborted, none is freed too early and none stays held.

Transfers are played by scripts here, and commands run when the test says so: every order can be had on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from eagleray.core.clock import ManualClock
from eagleray.core.config import EngineConfig
from eagleray.core.errors import InvalidRequest, TransferError
from eagleray.core.kv_region import KVRegion
from eagleray.core.messages import Accepted, RefusalKind, Refused, Submit
from eagleray.core.request import RequestSpec, RequestState
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.engine import Engine
from eagleray.engine.execution.fake import FakeExecutor
from eagleray.kv_transfer.pull import PullResult
from eagleray.kv_transfer.session import SourceProgress
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText
from eagleray.workers.hand_over import FINISHED_AT_SOURCE, ReaderHandOver, SourceHandOver

BLOCK_SIZE_TOKENS, NUM_BLOCKS = 4, 16
TOKENIZER = byte_tokenizer()
PROMPT = tuple(range(1, 11))


class Bench:
    """An engine, and the commands that were scheduled on its step thread: the test is that thread."""

    def __init__(self) -> None:
        self.executor = FakeExecutor(num_blocks=NUM_BLOCKS, block_size_tokens=BLOCK_SIZE_TOKENS)
        config = EngineConfig(block_size_tokens=BLOCK_SIZE_TOKENS, max_num_batched_tokens=8)
        self.engine = Engine(
            self.executor, config, ManualClock(), lambda spec: OutputText(TOKENIZER, spec.sampling, ())
        )
        self.commands: list[Callable[[Engine], None]] = []
        layout = self.executor.layout
        self.region = KVRegion("w", 1, layout, NUM_BLOCKS, (0,), "127.0.0.1:1", "model")

    def run_commands(self) -> None:
        while self.commands:
            self.commands.pop(0)(self.engine)

    @property
    def num_held(self) -> int:
        self.engine.check_integrity()
        return NUM_BLOCKS - self.engine.kv.pool.num_free

    def compute(self, request_id: str) -> list[int]:
        """Tokens of the request to its end."""
        tokens: list[int] = []
        while self.engine.state_of(request_id) is not None:
            tokens += [token for output in self.engine.step().outputs for token in output.token_ids]
        return tokens


def new_spec(max_tokens: int = 6, request_id: str = "a", token_ids: tuple[int, ...] = PROMPT) -> RequestSpec:
    sampling = SamplingParams(seed=1, max_tokens=max_tokens, ignore_eos=True)
    return RequestSpec(request_id=request_id, token_ids=token_ids, num_prompt_tokens=len(token_ids), sampling=sampling)


# ---- the reading side


class ScriptedReceiver:
    """In place of ``KVReceiver``: pulls end when the test says so."""

    def __init__(self) -> None:
        self.pulls: dict[str, tuple[int, tuple[int, ...], Callable[[PullResult], None]]] = {}
        self.cancelled: list[str] = []
        self.error: Exception | None = None

    def pull(
        self, request_id: str, source: KVRegion, first_block: int, block_ids: tuple[int, ...], on_done: Any
    ) -> None:
        if self.error is not None:
            raise self.error
        self.pulls[request_id] = (first_block, block_ids, on_done)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def end(self, request_id: str, *, reason: str, cancelled: bool = False) -> None:
        """The pull broke off before its first block."""
        first_block, _, on_done = self.pulls.pop(request_id)
        on_done(
            PullResult(
                request_id=request_id, num_verified_blocks=0, num_tokens=first_block * BLOCK_SIZE_TOKENS, token_ids=(),
                complete=False, cancelled=cancelled, reason=reason, num_bytes=0, copying_s=0.0, transfer_s=0.0,
                transport="tcp", skipped=(),
            )
        )  # fmt: skip


class Reading(Bench):
    def __init__(self) -> None:
        super().__init__()
        self.receiver = ScriptedReceiver()
        self.hand_over = ReaderHandOver(self.region, self.receiver, self.commands.append)  # type: ignore[arg-type]

    def accept(self, spec: RequestSpec | None = None) -> Accepted | Refused:
        return self.hand_over.accept(self.engine, Submit(spec or new_spec(), pull_from=self.region))

    def abort(self) -> None:
        self.hand_over.abort(self.engine, "a")


@pytest.fixture
def reading() -> Reading:
    return Reading()


def test_a_reservation_holds_blocks_for_the_prompt_and_the_next_token_before_any_byte_moves(reading: Reading) -> None:
    assert reading.accept() == Accepted("a")
    assert reading.num_held == 3
    assert reading.engine.state_of("a") is RequestState.RESERVED
    first_block, block_ids, _ = reading.receiver.pulls["a"]
    assert first_block == 0 and len(set(block_ids)) == 3


def test_a_cached_prefix_is_neither_pulled_nor_paid_for_again(reading: Reading) -> None:
    reading.engine.add(new_spec(request_id="before"))
    reading.compute("before")
    assert reading.accept() == Accepted("a", 2 * BLOCK_SIZE_TOKENS)
    first_block, block_ids, _ = reading.receiver.pulls["a"]
    assert (first_block, len(block_ids)) == (2, 1)


def test_an_abort_while_bytes_may_move_holds_the_blocks_until_the_pull_is_quiet(reading: Reading) -> None:
    reading.accept()
    reading.abort()
    assert reading.receiver.cancelled == ["a"]
    reading.run_commands()
    assert reading.num_held == 3
    reading.receiver.end("a", reason="cancelled", cancelled=True)
    assert reading.num_held == 3, "the receiver's threads free nothing themselves"
    reading.run_commands()
    assert reading.num_held == 0 and reading.engine.state_of("a") is None


def test_an_abort_between_the_end_of_a_pull_and_its_settling_wins(reading: Reading) -> None:
    reading.accept()
    reading.receiver.end("a", reason="the source is gone")
    reading.abort()
    reading.run_commands()
    assert reading.num_held == 0
    assert not reading.engine.has_work


def test_an_abort_after_settling_ends_a_request_like_any_other(reading: Reading) -> None:
    reading.accept()
    reading.receiver.end("a", reason="the source is gone")
    reading.run_commands()
    assert reading.engine.state_of("a") is RequestState.PREFILLING
    reading.abort()
    assert reading.num_held == 0 and reading.receiver.cancelled == []


def test_an_abort_twice_and_one_of_an_unknown_request_are_harmless(reading: Reading) -> None:
    reading.abort()
    reading.accept()
    reading.abort()
    reading.abort()
    reading.receiver.end("a", reason="cancelled", cancelled=True)
    reading.run_commands()
    reading.abort()
    assert reading.num_held == 0


def test_a_pull_that_breaks_off_is_computed_here_and_counted(reading: Reading) -> None:
    reading.accept()
    reading.receiver.end("a", reason="the source is gone")
    reading.run_commands()
    assert reading.hand_over.failures_total == 1
    assert reading.compute("a") == reading.executor.continuation(new_spec(), 6)
    assert reading.num_held == 0


def test_a_request_that_ended_at_its_source_is_let_go_and_is_no_failure(reading: Reading) -> None:
    reading.accept()
    reading.receiver.end("a", reason=FINISHED_AT_SOURCE)
    reading.run_commands()
    assert (reading.num_held, reading.hand_over.failures_total) == (0, 0)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TransferError("the receiver is stopped"), RefusalKind.DRAINING),
        (ValueError("is being pulled already"), RefusalKind.INCOMPATIBLE),
    ],
)
def test_a_pull_that_cannot_begin_refuses_the_request_and_holds_nothing(
    reading: Reading, error: Exception, kind: RefusalKind
) -> None:
    reading.receiver.error = error
    assert reading.accept() == Refused("a", kind, str(error))
    assert reading.num_held == 0 and reading.engine.state_of("a") is None
    reading.receiver.error = None
    assert isinstance(reading.accept(), Accepted)


def test_no_room_is_told_and_changes_nothing(reading: Reading) -> None:
    reading.accept(new_spec(request_id="large", token_ids=tuple(range(50))))
    held = reading.num_held
    refused = reading.accept(new_spec(token_ids=tuple(range(100, 120))))
    assert isinstance(refused, Refused) and refused.kind is RefusalKind.NO_ROOM
    assert reading.num_held == held and list(reading.receiver.pulls) == ["large"]


def test_a_request_id_that_is_here_already_is_refused_and_the_first_stays(reading: Reading) -> None:
    reading.accept()
    with pytest.raises(InvalidRequest, match="already"):
        reading.accept()
    assert reading.num_held == 3 and list(reading.receiver.pulls) == ["a"]


def test_a_source_of_another_layout_is_refused_naming_the_difference(reading: Reading) -> None:
    layout = msgspec.structs.replace(reading.region.layout, block_size_tokens=8)
    other = msgspec.structs.replace(reading.region, worker_id="p", layout=layout)
    refused = reading.hand_over.accept(reading.engine, Submit(new_spec(), pull_from=other))
    assert isinstance(refused, Refused)
    assert "KV of p cannot be read: block_size_tokens 4 here, 8 there" in refused.reason
    assert reading.num_held == 0


def test_a_source_with_another_draft_is_refused_naming_both(reading: Reading) -> None:
    other = msgspec.structs.replace(reading.region, worker_id="p", draft_identity="other")
    refused = reading.hand_over.accept(reading.engine, Submit(new_spec(), pull_from=other))
    assert isinstance(refused, Refused) and refused.kind is RefusalKind.INCOMPATIBLE
    assert "KV of p cannot be read: draft none here, other there" in refused.reason
    assert reading.num_held == 0


# ---- the source's side


class ScriptedSource:
    """In place of ``KVSource``: requests are released when the test says so."""

    def __init__(self, region: KVRegion, on_released: Callable[[str], None]) -> None:
        self.region = region
        self.release = on_released
        self.opened: list[str] = []
        self.closed: list[tuple[str, str]] = []
        self.announced: list[SourceProgress] = []
        self.error: Exception | None = None

    def open(self, request_id: str) -> None:
        if self.error is not None:
            raise self.error
        self.opened.append(request_id)

    def announce(self, request_id: str, progress: SourceProgress) -> None:
        self.announced.append(progress)

    def close(self, request_id: str, error: str) -> None:
        self.closed.append((request_id, error))


class Sending(Bench):
    def __init__(self) -> None:
        super().__init__()
        self.source: ScriptedSource
        self.hand_over = SourceHandOver(self._new_source, self.commands.append)  # type: ignore[arg-type]

    def _new_source(self, on_released: Callable[[str], None]) -> ScriptedSource:
        self.source = ScriptedSource(self.region, on_released)
        return self.source

    def accept(self, max_tokens: int = 6) -> Accepted | Refused:
        return self.hand_over.accept(self.engine, Submit(new_spec(max_tokens), hand_over=True))

    def step(self) -> None:
        self.hand_over.stepped(self.engine, self.engine.step())

    def abort(self) -> None:
        self.hand_over.abort(self.engine, "a")


@pytest.fixture
def sending() -> Sending:
    return Sending()


def test_chunks_are_announced_as_they_are_computed_and_the_last_one_with_its_token(sending: Sending) -> None:
    assert sending.accept() == Accepted("a")
    sending.step()
    sending.step()
    first, last = sending.source.announced
    assert (first.num_tokens, first.is_last, first.token_ids) == (8, False, ())
    assert (last.num_tokens, last.is_last) == (10, True)
    assert list(last.token_ids) == sending.executor.continuation(new_spec(), 1)
    assert sending.engine.state_of("a") is RequestState.HANDED_OVER
    assert not sending.engine.has_work


@pytest.mark.parametrize("num_steps", [0, 1, 2], ids=["queued", "computing", "handed over"])
def test_an_abort_at_any_stage_holds_the_blocks_until_the_source_has_let_go(sending: Sending, num_steps: int) -> None:
    sending.accept()
    for _ in range(num_steps):
        sending.step()
    held = sending.num_held
    sending.abort()
    sending.run_commands()
    assert sending.source.closed == [("a", "aborted")]
    assert sending.num_held == held
    sending.source.release("a")
    assert sending.num_held == held, "the source's threads free nothing themselves"
    sending.run_commands()
    assert sending.num_held == 0 and sending.engine.state_of("a") is None


def test_a_request_goes_on_being_computed_safely_between_its_abort_and_its_release(sending: Sending) -> None:
    sending.accept()
    sending.step()
    sending.abort()
    sending.step()
    sending.source.release("a")
    sending.run_commands()
    assert sending.num_held == 0 and not sending.engine.has_work


def test_a_reader_that_has_all_blocks_ends_the_request(sending: Sending) -> None:
    sending.accept()
    sending.step()
    sending.step()
    sending.source.release("a")
    sending.run_commands()
    assert sending.num_held == 0
    sending.abort()  # the ingress says so at the end of every request
    assert sending.source.closed == []


def test_a_request_that_ends_with_its_first_token_tells_its_reader_and_waits_for_it_to_leave(sending: Sending) -> None:
    sending.accept(max_tokens=1)
    sending.step()
    sending.step()
    assert sending.source.closed == [("a", FINISHED_AT_SOURCE)]
    assert sending.num_held > 0
    sending.source.release("a")
    sending.run_commands()
    assert sending.num_held == 0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TransferError("the source is stopped"), RefusalKind.DRAINING),
        (ValueError("was opened before"), RefusalKind.INCOMPATIBLE),
    ],
)
def test_a_request_that_the_source_does_not_open_is_refused_and_leaves_nothing(
    sending: Sending, error: Exception, kind: RefusalKind
) -> None:
    sending.source.error = error
    assert sending.accept() == Refused("a", kind, str(error))
    assert sending.num_held == 0 and not sending.engine.has_work
    sending.source.error = None
    assert isinstance(sending.accept(), Accepted)


def test_a_request_that_the_engine_refuses_is_not_opened(sending: Sending) -> None:
    too_long = new_spec(token_ids=tuple(range(NUM_BLOCKS * BLOCK_SIZE_TOKENS)))
    with pytest.raises(InvalidRequest):
        sending.hand_over.accept(sending.engine, Submit(too_long, hand_over=True))
    assert sending.source.opened == [] and sending.num_held == 0


def test_a_request_that_nobody_will_read_runs_to_its_end_without_the_source(sending: Sending) -> None:
    sending.hand_over.accept(sending.engine, Submit(new_spec()))
    assert sending.compute("a") == sending.executor.continuation(new_spec(), 6)
    assert sending.source.opened == [] and sending.num_held == 0


def test_a_request_that_nobody_will_read_is_aborted_at_once(sending: Sending) -> None:
    sending.hand_over.accept(sending.engine, Submit(new_spec()))
    sending.step()
    sending.abort()
    assert sending.num_held == 0 and sending.source.closed == []
