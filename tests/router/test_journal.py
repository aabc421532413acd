"""What two workers say over two connections becomes one answer in order, without holes or doubles."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.core.block_hash import BlockHash, extend_block_hashes, hash_blocks
from eagleray.core.messages import TokenLogprobs, TokenOutput
from eagleray.core.request import FinishReason, RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.router.journal import INLINE_HASH_TOKENS, Journal

PROMPT = (1, 2, 3)
ANSWER = tuple(range(100, 110))
ROOT = BlockHash(b"root")


def new_journal(emitted: tuple[int, ...] = ()) -> Journal:
    spec = RequestSpec(
        request_id="a", token_ids=PROMPT + emitted, num_prompt_tokens=len(PROMPT), sampling=SamplingParams()
    )
    return Journal(spec, arrival_s=0.0)


def says(start: int, end: int) -> TokenOutput:
    """Positions ``start`` to ``end`` of the answer, with its end where it has one."""
    tokens = ANSWER[start:end]
    return TokenOutput(
        "a.0.1",
        start,
        token_ids=tokens,
        texts=tuple(map(str, tokens)),
        logprobs=tuple(TokenLogprobs(token, -1.0, 1) for token in tokens),
        finish_reason=FinishReason.STOP if end == len(ANSWER) else None,
    )


def taken(journal: Journal, *outputs: TokenOutput) -> list[int]:
    return [token for output in outputs for new in journal.take(output) for token in new.token_ids]


def test_tokens_in_order_pass_unchanged() -> None:
    journal, output = new_journal(), says(0, 2)
    assert journal.take(output) == [output]
    assert journal.request.token_ids == [*PROMPT, *ANSWER[:2]]


def test_a_second_token_waits_for_the_first() -> None:
    journal = new_journal()
    assert journal.take(says(1, 2)) == []
    assert journal.has_gap
    assert taken(journal, says(0, 1)) == [100, 101]
    assert not journal.has_gap


def test_a_doubled_token_passes_once() -> None:
    journal = new_journal()
    assert taken(journal, says(0, 2), says(0, 2), says(1, 2)) == [100, 101]
    assert not journal.has_gap


def test_of_a_partly_known_output_only_the_rest_passes_with_texts_and_logprobs_that_fit() -> None:
    journal = new_journal()
    journal.take(says(0, 2))
    [new] = journal.take(says(1, 4))
    assert (new.position, new.token_ids, new.texts) == (2, (102, 103), ("102", "103"))
    assert new.logprobs is not None and [entry.token_id for entry in new.logprobs] == [102, 103]


def test_a_known_token_that_brings_the_end_still_ends_the_answer() -> None:
    journal = new_journal(ANSWER)
    [new] = journal.take(says(len(ANSWER) - 1, len(ANSWER)))
    assert (new.token_ids, new.finish_reason) == ((), FinishReason.STOP)
    assert journal.is_finished


def test_nothing_passes_after_the_end() -> None:
    journal = new_journal()
    assert taken(journal, says(0, len(ANSWER))) == list(ANSWER)
    assert journal.is_finished
    assert journal.take(TokenOutput("a.0.1", len(ANSWER), token_ids=(1,))) == []


def test_an_end_without_a_token_passes() -> None:
    journal = new_journal()
    journal.take(says(0, 3))
    [end] = journal.take(TokenOutput("a.0.1", 3, finish_reason=FinishReason.STOP))
    assert end.finish_reason is FinishReason.STOP and journal.is_finished


def test_what_waited_in_a_lost_attempt_is_said_again_by_the_next() -> None:
    journal = new_journal()
    journal.take(says(2, 4))
    journal.forget_early()
    assert not journal.has_gap
    assert taken(journal, says(0, 1)) == [100]
    assert taken(journal, says(1, 4)) == [101, 102, 103]


def test_a_continuation_begins_after_what_has_passed() -> None:
    journal = new_journal()
    journal.take(says(0, 3))
    journal.take(says(5, 6))
    spec = journal.request.continuation("a.0.2")
    assert (spec.token_ids, spec.num_prompt_tokens) == ((*PROMPT, *ANSWER[:3]), len(PROMPT))


PIECES = st.lists(st.integers(0, len(ANSWER) - 1).flatmap(lambda start: st.tuples(st.just(start), st.integers(1, 4))))


@given(PIECES, st.randoms(use_true_random=False))
def test_any_order_and_any_doubles_give_the_answer_once(pieces: list[tuple[int, int]], chance: object) -> None:
    outputs = [says(start, min(start + length, len(ANSWER))) for start, length in pieces]
    outputs += [says(position, position + 1) for position in range(len(ANSWER))]
    chance.shuffle(outputs)  # type: ignore[attr-defined]
    journal = new_journal()
    passed = [new for output in outputs for new in journal.take(output)]
    assert [token for new in passed for token in new.token_ids] == list(ANSWER)
    assert [new.finish_reason for new in passed].count(FinishReason.STOP) == 1
    positions = [new.position for new in passed]
    assert positions == sorted(positions)


@pytest.mark.parametrize("start", [1, 5])
def test_a_gap_is_seen_only_while_something_waits(start: int) -> None:
    journal = new_journal()
    assert not journal.has_gap
    journal.take(says(start, start + 1))
    assert journal.has_gap


# ---- hashes of what is known


async def test_block_hashes_are_those_of_all_known_tokens_and_each_is_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = new_journal()
    tokens = journal.request.token_ids
    tokens.extend(range(20))
    assert await journal.block_hashes(ROOT, 4) == hash_blocks(ROOT, tokens, 4)
    seen: list[int] = []

    def noted(hashes: list[BlockHash], *rest: Any) -> None:
        seen.append(len(hashes))
        extend_block_hashes(hashes, *rest)

    monkeypatch.setattr("eagleray.router.journal.extend_block_hashes", noted)
    num_before = len(tokens) // 4
    tokens.extend(range(4))
    assert await journal.block_hashes(ROOT, 4) == hash_blocks(ROOT, tokens, 4)
    assert seen == [num_before]
    other = BlockHash(b"other model")
    assert await journal.block_hashes(other, 4) == hash_blocks(other, tokens, 4)


@pytest.mark.parametrize(("num_tokens", "elsewhere"), [(100, False), (INLINE_HASH_TOKENS + 100, True)])
async def test_a_long_prompt_is_hashed_off_the_event_loop(
    num_tokens: int, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr(
        "eagleray.router.journal.extend_block_hashes", lambda *_: threads.append(threading.current_thread())
    )
    journal = new_journal()
    journal.request.token_ids.extend(range(num_tokens))
    await journal.block_hashes(ROOT, 16)
    assert (threads != [threading.current_thread()]) == elsewhere
