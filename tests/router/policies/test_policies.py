from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.core.config import RouterConfig
from eagleray.core.errors import ConfigError
from eagleray.core.snapshot import Role, WorkerSnapshot
from eagleray.router.policies.registry import POLICIES, make_policy
from eagleray.router.view import ClusterView, Route, RoutingRequest, WorkerView

REQUEST = RoutingRequest(num_tokens=1000, max_new_tokens=100, block_size_tokens=16, sequence=0)
LOAD_AWARE = ["least_loaded", "prefix_aware", "predicted_time"]
CACHE_AWARE = ["prefix_aware", "predicted_time"]


def worker(worker_id: str, role: Role = Role.DECODE, *, cached: int = 0, pending: int = 0, **rest: Any) -> WorkerView:
    snapshot = WorkerSnapshot(
        worker_id=worker_id, role=role, epoch=1, **{"blocks_total": 1000, "blocks_free": 1000, **rest}
    )
    return WorkerView(
        snapshot,
        cached_tokens=cached,
        pending_requests=bool(pending),
        pending_tokens=pending,
        pending_held_tokens=pending,
    )


def cluster(prefill: list[WorkerView], decode: list[WorkerView], local_prefill_tokens: int = 32) -> ClusterView:
    return ClusterView(
        prefill={view.worker_id: view for view in prefill},
        decode={view.worker_id: view for view in decode},
        block_bytes=2**16,
        local_prefill_tokens=local_prefill_tokens,
        transfer_bytes_per_s=1e9,
    )


def prefill(worker_id: str, **rest: Any) -> WorkerView:
    return worker(worker_id, Role.PREFILL, **rest)


def choose(policy: str, view: ClusterView, request: RoutingRequest = REQUEST) -> Route:
    route = make_policy(policy).choose(request, view)
    assert route is not None
    return route


@st.composite
def pools(draw: st.DrawFn, role: Role, letter: str) -> Mapping[str, WorkerView]:
    def view(number: int) -> WorkerView:
        total = draw(st.integers(0, 500))
        snapshot = WorkerSnapshot(
            worker_id=f"{letter}{number}",
            role=role,
            epoch=1,
            num_waiting=draw(st.integers(0, 5)),
            num_running=draw(st.integers(0, 50)),
            uncomputed_tokens=draw(st.integers(0, 5000)),
            blocks_total=total,
            blocks_free=draw(st.integers(0, total)),
            prefill_tokens_per_s=draw(st.sampled_from([0.0, 100.0, 1e5])),
            decode_step_s=draw(st.sampled_from([0.0, 0.01, 0.1])),
        )
        return WorkerView(snapshot, draw(st.integers(0, 200)), draw(st.integers(0, 3)), draw(st.integers(0, 900)))

    return {view.worker_id: view for view in map(view, range(draw(st.integers(0, 4))))}


VIEWS = st.builds(
    ClusterView,
    prefill=pools(Role.PREFILL, "p"),
    decode=pools(Role.DECODE, "d"),
    block_bytes=st.sampled_from([1024, 2**20]),
    local_prefill_tokens=st.integers(0, 64),
    transfer_bytes_per_s=st.sampled_from([1e6, 1e10]),
)
REQUESTS = st.builds(
    RoutingRequest,
    num_tokens=st.integers(1, 200),
    max_new_tokens=st.integers(0, 200),
    block_size_tokens=st.just(16),
    sequence=st.integers(0, 100),
    reads_cache=st.booleans(),
)


@pytest.mark.parametrize("policy", POLICIES)
@given(view=VIEWS, request_=REQUESTS)
def test_a_route_names_workers_of_the_view_and_is_the_same_each_time(
    policy: str, view: ClusterView, request_: RoutingRequest
) -> None:
    route = make_policy(policy).choose(request_, view)
    if not view.decode:
        assert route is None
        return
    assert route is not None and route.decode in view.decode
    assert route.prefill is None or route.prefill in view.prefill
    assert route.reason
    assert make_policy(policy).choose(request_, _in_reverse(view)) == route


def _in_reverse(view: ClusterView) -> ClusterView:
    return replace(view, prefill=dict(reversed(view.prefill.items())), decode=dict(reversed(view.decode.items())))


@pytest.mark.parametrize("policy", POLICIES)
@given(view=VIEWS, request_=REQUESTS)
def test_a_short_uncached_suffix_is_never_sent_to_a_prefill_worker(
    policy: str, view: ClusterView, request_: RoutingRequest
) -> None:
    route = make_policy(policy).choose(request_, view)
    if route is not None and route.prefill is not None:
        cached = view.decode[route.decode].cached_tokens if request_.reads_cache else 0
        assert max(request_.num_tokens - cached, 1) > view.local_prefill_tokens  # the last token is always computed


@pytest.mark.parametrize("policy", LOAD_AWARE)
@given(view=VIEWS, request_=REQUESTS)
def test_a_worker_without_room_is_chosen_only_when_all_are(
    policy: str, view: ClusterView, request_: RoutingRequest
) -> None:
    def has_room(worker: WorkerView) -> bool:
        blocks = -(-(request_.num_tokens + request_.max_new_tokens) // 16) + -(-worker.pending_held_tokens // 16)
        return worker.snapshot.blocks_free >= blocks

    route = make_policy(policy).choose(request_, view)
    if route is not None and any(has_room(worker) for worker in view.decode.values()):
        assert has_room(view.decode[route.decode])


@pytest.mark.parametrize("policy", POLICIES)
def test_without_prefill_workers_the_decode_worker_does_both(policy: str) -> None:
    route = choose(policy, cluster([], [worker("d0"), worker("d1")]))
    assert route.prefill is None and "no prefill worker" in route.reason


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_prompt_takes_a_prefill_worker_and_a_short_suffix_says_why_not(policy: str) -> None:
    assert choose(policy, cluster([prefill("p0")], [worker("d0")])).prefill == "p0"
    route = choose(policy, cluster([prefill("p0")], [worker("d0", cached=976)]))
    assert route.prefill is None and "24 uncached tokens" in route.reason
    uncacheable = replace(REQUEST, reads_cache=False)
    assert choose(policy, cluster([prefill("p0")], [worker("d0", cached=976)]), uncacheable).prefill == "p0"


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_workers_get_equal_shares(policy: str) -> None:
    view = cluster([prefill(f"p{n}") for n in range(3)], [worker(f"d{n}") for n in range(4)])
    routes = [choose(policy, view, replace(REQUEST, sequence=sequence)) for sequence in range(12)]
    assert Counter(route.decode for route in routes) == dict.fromkeys(view.decode, 3)
    assert Counter(route.prefill for route in routes) == dict.fromkeys(view.prefill, 4)


@pytest.mark.parametrize("policy", LOAD_AWARE)
def test_busy_workers_are_avoided(policy: str) -> None:
    view = cluster(
        [prefill("p0", uncomputed_tokens=9000), prefill("p1", uncomputed_tokens=50)],
        [worker("d0", num_running=30, decode_step_s=0.05), worker("d1", num_running=2, decode_step_s=0.02)],
    )
    assert [choose(policy, view).prefill, choose(policy, view).decode] == ["p1", "d1"]


@pytest.mark.parametrize("policy", LOAD_AWARE)
def test_what_was_just_sent_counts_as_load(policy: str) -> None:
    view = cluster([prefill("p0", pending=800), prefill("p1")], [worker("d0", pending=800), worker("d1")])
    assert [choose(policy, view).prefill, choose(policy, view).decode] == ["p1", "d1"]


@pytest.mark.parametrize("policy", CACHE_AWARE)
@pytest.mark.parametrize("sequence", [0, 1])
def test_the_cached_prefix_is_preferred_when_it_pays(policy: str, sequence: int) -> None:
    view = cluster(
        [prefill("p0", cached=800, uncomputed_tokens=200), prefill("p1", uncomputed_tokens=100)],
        [worker("d0", cached=800, num_running=1), worker("d1", num_running=1)],
    )
    route = choose(policy, view, replace(REQUEST, sequence=sequence))
    assert [route.prefill, route.decode] == ["p0", "d0"]


@pytest.mark.parametrize("policy", CACHE_AWARE)
def test_the_cached_prefix_is_given_up_when_its_holder_is_overloaded(policy: str) -> None:
    view = cluster(
        [prefill("p0", cached=800, uncomputed_tokens=20_000), prefill("p1")],
        [worker("d0", cached=800, num_running=60), worker("d1", num_running=1)],
    )
    route = choose(policy, view)
    assert [route.prefill, route.decode] == ["p1", "d1"]


def test_prefix_aware_does_not_herd_all_requests_to_the_first_holder_of_a_short_common_prefix() -> None:
    view = cluster([prefill("p0", cached=64, uncomputed_tokens=10), prefill("p1")], [worker("d0")])
    assert choose("prefix_aware", view).prefill == "p1"


def test_predicted_time_says_what_it_predicts() -> None:
    view = cluster(
        [prefill("p0", cached=200, uncomputed_tokens=500, prefill_tokens_per_s=1000.0)], [worker("d0", num_running=9)]
    )
    route = choose("predicted_time", view)
    assert "queue 0.500 s, prefill 0.800 s" in route.reason


def test_predicted_time_prefills_locally_when_the_prefill_queue_is_long() -> None:
    idle, busy = worker("d0"), worker("d0", num_running=50)
    queue = prefill("p0", uncomputed_tokens=5000)
    assert choose("predicted_time", cluster([queue], [idle])).prefill is None
    assert choose("predicted_time", cluster([queue], [busy])).prefill == "p0", "the harm to 50 requests is larger"


def test_predicted_time_counts_only_the_transfer_that_prefill_does_not_hide() -> None:
    # The holder of the prefix on the decode side has more to do. What that saves is worth it only on a slow network.
    view = cluster(
        [prefill("p0", prefill_tokens_per_s=10_000.0)],
        [worker("d0", cached=512, num_running=3), worker("d1", num_running=2)],
    )
    assert choose("predicted_time", replace(view, transfer_bytes_per_s=4e7)).decode == "d1"
    assert choose("predicted_time", replace(view, transfer_bytes_per_s=1e7)).decode == "d0"


def test_predicted_time_takes_unmeasured_workers_for_average_ones() -> None:
    measured = {"prefill_tokens_per_s": 100.0}
    view = cluster(
        [prefill("p0", uncomputed_tokens=0, **measured), prefill("p1", uncomputed_tokens=10)],
        [worker("d0", num_running=9)],
    )
    assert choose("predicted_time", view).prefill == "p0"


def test_every_configured_name_is_a_policy_and_no_other() -> None:
    names = RouterConfig.model_fields["policy"].annotation.__args__  # type: ignore[union-attr]
    assert set(names) == set(POLICIES)
    with pytest.raises(ConfigError, match=r"router\.policy='fastest'"):
        make_policy("fastest")
