"""The life of a request: one table of edges, and specs that carry all that another worker needs."""

from __future__ import annotations

import pytest

from eagleray.core.errors import IllegalTransition
from eagleray.core.request import TRANSITIONS, Request, RequestSpec, RequestState
from eagleray.core.sampling_params import SamplingParams

LEGAL = [(state, target) for state, targets in TRANSITIONS.items() for target in targets]
ILLEGAL = [(state, target) for state in RequestState for target in RequestState if target not in TRANSITIONS[state]]


def new_request(token_ids: tuple[int, ...] = (1, 2, 3), num_prompt_tokens: int = 3) -> Request:
    sampling = SamplingParams(seed=7, max_tokens=9)
    spec = RequestSpec(
        request_id="a", token_ids=token_ids, num_prompt_tokens=num_prompt_tokens, sampling=sampling, choice=2,
        tenant_salt="salt", priority=4, eos_token_ids=(0,), trace_parent="00-x",
    )  # fmt: skip
    return Request(spec, arrival_s=1.5)


def in_state(state: RequestState) -> Request:
    request = new_request()
    request.state = state
    return request


def test_the_table_has_a_row_for_every_state() -> None:
    assert TRANSITIONS.keys() == set(RequestState)


@pytest.mark.parametrize(("state", "target"), LEGAL, ids=lambda state: state.value)
def test_a_legal_edge_is_taken(state: RequestState, target: RequestState) -> None:
    request = in_state(state)
    request.move(target)
    assert request.state is target


@pytest.mark.parametrize(("state", "target"), ILLEGAL, ids=lambda state: state.value)
def test_an_illegal_edge_raises_names_both_states_and_changes_nothing(
    state: RequestState, target: RequestState
) -> None:
    request = in_state(state)
    with pytest.raises(IllegalTransition, match=f"request a: {state.value} -> {target.value}"):
        request.move(target)
    assert request.state is state


def test_exactly_the_final_states_have_no_way_out_and_every_other_can_be_aborted() -> None:
    for state in RequestState:
        assert state.is_final == (not TRANSITIONS[state])
        if not state.is_final:
            assert RequestState.ABORTED in TRANSITIONS[state]


def test_every_state_can_be_reached_from_the_first() -> None:
    reached, border = {RequestState.QUEUED}, {RequestState.QUEUED}
    while border:
        border = {target for state in border for target in TRANSITIONS[state]} - reached
        reached |= border
    assert reached == set(RequestState)


def test_a_new_request_has_computed_and_emitted_nothing() -> None:
    request = new_request()
    assert (request.state, request.num_tokens, request.num_uncomputed_tokens) == (RequestState.QUEUED, 3, 3)
    assert (request.num_output_tokens, request.num_emitted_here) == (0, 0)


def test_a_continuation_knows_all_tokens_and_what_was_the_prompt_and_changes_nothing_else() -> None:
    request = new_request()
    request.token_ids += [10, 11]
    spec = request.continuation("b")
    assert (spec.request_id, spec.token_ids, spec.num_prompt_tokens) == ("b", (1, 2, 3, 10, 11), 3)
    for field in ("sampling", "choice", "tenant_salt", "priority", "eos_token_ids", "trace_parent"):
        assert getattr(spec, field) == getattr(request.spec, field)


def test_a_continued_request_counts_outputs_from_the_prompt_and_its_own_from_where_it_began() -> None:
    request = new_request((1, 2, 3, 10, 11), num_prompt_tokens=3)
    request.token_ids.append(12)
    assert (request.num_output_tokens, request.num_emitted_here) == (3, 1)


def test_growing_a_request_leaves_its_spec_as_it_was_sent() -> None:
    request = new_request()
    request.token_ids.append(4)
    assert request.spec.token_ids == (1, 2, 3)
