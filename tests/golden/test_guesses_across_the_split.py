"""A draft goes on wherever its request goes: the same guesses, of which as many come true, however it was served.

What a draft head needs lies in the request's blocks. So the guesses after n tokens, and how many of them come true, are
a function of those n tokens alone. The oracle computes them from nothing: an engine that has never seen the request is
given its first n tokens as they are, for every n. Then the request is served in all the ways that there are; each guess
that any of its workers makes must be the oracle's, and each step must accept as many as the oracle's come true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import pytest
from served_requests import (
    MADE_TO_AGREE,
    MAX_DEPTH,
    NUM_NEW_TOKENS,
    SHAPES,
    Checkpoints,
    Records,
    Tokens,
    save_checkpoints,
    specs,
)
from ways_to_serve import (
    CLUSTER,
    WAYS,
    EvenTimes,
    closing_executors,
    new_text,
    running_engine,
    serve_offline,
    tokens_of,
)

from eagleray.cluster.local import LocalCluster
from eagleray.core.config import SpeculationConfig, parse_config
from eagleray.core.request import RequestSpec
from eagleray.core.snapshot import Role
from eagleray.engine.speculation.eagle import EagleInStep
from eagleray.engine.speculation.ngram import look_up
from eagleray.engine.speculation.tree import DraftTree, chain
from eagleray.engine.speculation.verify import accepted_nodes
from eagleray.models.draft_heads.random_draft import save_random_draft
from eagleray.models.registry import load_model_config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return save_checkpoints(tmp_path_factory.mktemp("models"))


# ---- the oracle


@dataclass(frozen=True)
class Oracle:
    tokens: Tokens
    guesses: Mapping[tuple[str, int], DraftTree]  # by request and known tokens

    def num_accepted(self, index: str, num_known: int, draft: DraftTree) -> int:
        """How many of the guesses come true."""
        known = (*specs()[int(index)].token_ids, *self.tokens[index])
        return len(accepted_nodes(draft, [known[num_known + depth] for depth in (0, *draft.depths)]))


def make_oracle(
    checkpoints: Checkpoints,
    speculation: Mapping[str, Any],
    num_new_tokens: int = NUM_NEW_TOKENS,
    places: Iterable[tuple[str, int]] | None = None,
) -> Oracle:
    """Tokens without guesses, a few more than are asked for; guesses for requests of which nothing is computed, after
    each token or at some ``places``."""
    with running_engine(checkpoints, None, Records()) as engine:
        tokens = tokens_of(engine, specs(num_new_tokens + MAX_DEPTH))
    if places is None:
        places = [(index, num_known) for index in tokens for num_known in places_of(index)]
    records = Records()
    beginnings = [beginning(specs()[int(index)], num_known, tokens[index]) for index, num_known in places]
    room = {"enable_prefix_caching": False, "num_blocks": 8192}  # nobody goes without guesses for want of blocks
    with running_engine(checkpoints, speculation, records, **room) as engine:
        tokens_of(engine, beginnings)
    return Oracle(tokens, {key: guess for key, [guess] in records.guesses.items()})


def places_of(index: str) -> range:
    """Numbers of known tokens after which it guesses."""
    begin = specs()[int(index)].num_prompt_tokens + 1
    return range(begin, begin + NUM_NEW_TOKENS)


def beginning(spec: RequestSpec, num_known: int, tokens: Sequence[int]) -> RequestSpec:
    """Of a request, so that its first guess is the one after ``num_known`` tokens."""
    count = num_known - spec.num_prompt_tokens - 1
    return RequestSpec(
        request_id=f"{spec.request_id}.{count}",
        token_ids=spec.token_ids + tuple(tokens[:count]),
        num_prompt_tokens=spec.num_prompt_tokens,
        sampling=msgspec.structs.replace(spec.sampling, max_tokens=count + 3),  # fewer need no guess
    )


@pytest.fixture(scope="module")
def oracles(checkpoints: Checkpoints) -> Callable[[str], Oracle]:
    """By method and shape."""
    return cache(lambda method: make_oracle(checkpoints, checkpoints.speculation[method]))


# The default draft and other usual ones in every way; others in the ways that move or lose KV.
RANDOM = ("eagle of two layers, tree", "random eagle3, chain")  # not made to agree: all that came before has its say
USUAL = ("eagle3, chain", "eagle3, tree", "eagle, tree")
OTHERS = (
    "eagle, fixed tree",
    *RANDOM,
    "medusa, tree",
    "draft_model, chain",
    "draft_model, tree",
    "early_exit, chain",
    "early_exit, tree",
)
MOVING = (
    "guessed for now and then",
    "prefix hit",
    "preempted by swap",
    "split over tcp",
    "split, prefix hit",
    "decode worker dies",
)
# Each is made of parts that the ones above have as well.
COMPOSED = (
    "eagle, chain", "eagle3, fixed tree", "medusa, chain", "medusa, fixed tree", "draft_model, fixed tree",
    "early_exit, fixed tree",
)  # fmt: skip
CASES = [
    *((method, way) for method in USUAL for way in WAYS),
    *((method, way) for method in OTHERS for way in MOVING),
    *((method, way) for method in COMPOSED for way in ("preempted by swap", "split, prefix hit")),
]


@pytest.mark.parametrize(("method", "way"), CASES)
def test_guesses_and_what_comes_true_depend_on_the_tokens_alone(
    checkpoints: Checkpoints, oracles: Callable[[str], Oracle], method: str, way: str
) -> None:
    oracle, served = oracles(method), WAYS[way](checkpoints, checkpoints.speculation[method])
    assert served.tokens == {index: tokens[:NUM_NEW_TOKENS] for index, tokens in oracle.tokens.items()}
    for (index, num_known), guesses in served.records.guesses.items():
        if num_known in places_of(index):  # else of a step beyond the end of the request
            whole = oracle.guesses[index, num_known]
            assert all(guess == whole or is_shorter_chain(guess, whole) for guess in guesses), (index, num_known)
    assert served.records.accepted and (method in RANDOM or served.records.mean_accepted > 0.5)
    for (index, num_known), steps in served.records.accepted.items():
        for draft, num_accepted, _ in steps:
            assert draft == oracle.guesses[index, num_known].first(len(draft))  # a full step verifies only the first
            assert num_accepted == oracle.num_accepted(index, num_known, draft), (index, num_known)


def is_shorter_chain(guess: DraftTree, whole: DraftTree) -> bool:
    """As where many requests share a step."""
    return whole.is_chain and len(guess) > 0 and guess == whole.first(len(guess))


@pytest.mark.parametrize("method", RANDOM)
def test_where_features_of_accepted_guesses_are_not_kept_other_guesses_follow(
    checkpoints: Checkpoints, oracles: Callable[[str], Oracle], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A check on the test above: it would find that out, though tokens stay as they are."""
    monkeypatch.setattr(EagleInStep, "settle", lambda in_step, step: None)
    oracle, served = oracles(method), serve_offline(checkpoints, checkpoints.speculation[method])
    assert served.tokens == {index: tokens[:NUM_NEW_TOKENS] for index, tokens in oracle.tokens.items()}
    guesses = {key: guesses for key, guesses in served.records.guesses.items() if key in oracle.guesses}
    assert sum(guesses != {oracle.guesses[key]} for key, guesses in guesses.items()) > 20


@pytest.mark.parametrize("method", ["eagle3, chain", "eagle3, tree", "draft_model, chain"])
@pytest.mark.parametrize("way", ["aggregated", "preempted by swap", "split over tcp"])
def test_tokens_and_what_comes_true_stay_the_same_while_a_controller_changes_what_is_guessed(
    checkpoints: Checkpoints, oracles: Callable[[str], Oracle], method: str, way: str
) -> None:
    oracle, adaptive = oracles(method), {**checkpoints.speculation[method], "adaptive": True}
    served = WAYS[way](checkpoints, adaptive, with_policy=EvenTimes)
    assert served.tokens == {index: tokens[:NUM_NEW_TOKENS] for index, tokens in oracle.tokens.items()}
    assert None in served.records.shapes and len(served.records.shapes) > 1
    assert served.records.mean_accepted > 0
    for (index, num_known), steps in served.records.accepted.items():
        whole = oracle.guesses[index, num_known]
        for draft, num_accepted, _ in steps:
            assert draft == whole.first(len(draft)) or not whole.is_chain  # a smaller tree has other nodes
            assert num_accepted == oracle.num_accepted(index, num_known, draft), (index, num_known)


LOOK_UP = SpeculationConfig(method="ngram", num_speculative_tokens=MAX_DEPTH, adaptive=False)


@pytest.mark.parametrize("way", ["split over tcp", "split, prefix hit", "decode worker dies"])
def test_what_text_look_up_guesses_depends_on_the_tokens_alone(checkpoints: Checkpoints, way: str) -> None:
    """In answers so long that they say again what they have said: then it comes true."""
    num_new_tokens = 100
    with running_engine(checkpoints, None, Records()) as engine:
        tokens = tokens_of(engine, specs(num_new_tokens))
    served = WAYS[way](checkpoints, LOOK_UP.model_dump(exclude_defaults=True), num_new_tokens=num_new_tokens)
    assert served.tokens == tokens
    for (index, num_known), steps in served.records.accepted.items():
        known = [*specs()[int(index)].token_ids, *tokens[index]][:num_known]
        found = chain(look_up(known, MAX_DEPTH, LOOK_UP.prompt_lookup_min, LOOK_UP.prompt_lookup_max))
        assert all(step.draft == found.first(len(step.draft)) for step in steps)
    assert served.records.mean_accepted > 1


@pytest.fixture(scope="module")
def alone_in_long(checkpoints: Checkpoints) -> Callable[[str], Records]:
    """Of aggregated serving, by method. Answers are as long as the model allows."""
    return cache(lambda method: serve_offline(checkpoints, checkpoints.speculation[method], num_new_tokens=100).records)


EVERY_METHOD = (
    "eagle3, chain",
    "eagle3, tree",
    "eagle, tree",
    "medusa, tree",
    "draft_model, chain",
    "early_exit, chain",
)


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("way", ["split over tcp", "prefix hit", "split, prefix hit"])
def test_tokens_per_step_differ_by_less_than_one_percent_from_aggregated_serving(
    checkpoints: Checkpoints, alone_in_long: Callable[[str], Records], way: str, method: str
) -> None:
    """Over all steps that decode, but for one of each request that is handed over, the first: whoever reads KV has no
    guesses yet, as only its writer had the hidden states to guess from. Answers are as long as the model allows, so
    that it matters little with which of its tokens a request's steps begin."""
    alone = alone_in_long(method)
    served = WAYS[way](checkpoints, checkpoints.speculation[method], num_new_tokens=100).records
    assert alone.num_first_steps == 0 and (served.num_first_steps == 0) == (way == "prefix hit")
    assert fmean(served.decode_steps) == pytest.approx(fmean(alone.decode_steps), rel=0.01)


@pytest.mark.parametrize(
    "method", [f"{method}, {shape}" for method in (*MADE_TO_AGREE, "early_exit") for shape in SHAPES]
)
def test_guesses_of_drafts_made_to_agree_come_true(alone_in_long: Callable[[str], Records], method: str) -> None:
    """A check on the tests above: they compare something, and in trees the KV of deep guesses is brought to its place.
    In long answers: the last guesses are cut to what is left."""
    records = alone_in_long(method)
    assert records.mean_accepted > 1.5
    assert min(records.num_accepted(spec.request_id) for spec in specs()) > 10  # whatever its way to sample
    assert (records.num_moved > 100) == ("tree" in method)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_after_a_fail_over_the_same_guesses_come_true_as_if_no_worker_had_died(
    checkpoints: Checkpoints, method: str
) -> None:
    """Of requests that lose their decode worker in the midst of answers as long as the model allows: each step before
    that and each step after it accepts exactly as many as come true for a request of which nothing was computed, and
    none but the first after a hand-over goes without guesses. So tokens per step change with the text alone."""
    num_new_tokens, speculation = 100, checkpoints.speculation[method]
    served = WAYS["decode worker dies"](checkpoints, speculation, num_new_tokens=num_new_tokens, kill_after=40)
    attempts: dict[str, set[int]] = {}
    for (index, _), steps in served.records.accepted.items():
        attempts.setdefault(index, set()).update(step.attempt for step in steps)
    lost = {place: steps for place, steps in served.records.accepted.items() if len(attempts[place[0]]) == 2}
    oracle = make_oracle(checkpoints, speculation, num_new_tokens, lost)
    before: list[int] = []
    after: list[int] = []
    for (index, num_known), steps in lost.items():
        for draft, num_accepted, attempt in steps:
            assert draft == oracle.guesses[index, num_known].first(len(draft)), (index, num_known)
            assert num_accepted == oracle.num_accepted(index, num_known, draft), (index, num_known)
            (before if attempt == min(attempts[index]) else after).append(num_accepted)
    assert min(len(before), len(after)) > 5 and min(fmean(before), fmean(after)) > 1
    assert served.records.num_unguessed == 0


@pytest.mark.parametrize("other", [None, "seed"], ids=["no draft", "another draft"])
def test_a_prefill_worker_with_another_draft_is_not_read(
    checkpoints: Checkpoints, oracles: Callable[[str], Oracle], tmp_path: Path, other: str | None
) -> None:
    """While a pool is replaced: requests are served by the decode worker alone, which says why."""
    save_random_draft(tmp_path / "other", "eagle", load_model_config(checkpoints.target), seed=9)
    mine = checkpoints.speculation["eagle, tree"]
    theirs = None if other is None else {**mine, "model": str(tmp_path / "other")}
    config = parse_config({**CLUSTER, "speculation": mine})

    async def serve() -> None:
        with closing_executors(checkpoints, config, Records(), {Role.PREFILL: theirs}) as new_executor:
            async with LocalCluster(config, new_executor, new_text) as cluster:
                generation = cluster.coordinator.generate(specs()[-1])
                tokens = [token async for output in generation for token in output.token_ids]
        assert tokens == oracles("eagle, tree").tokens["7"][:NUM_NEW_TOKENS]
        assert generation.account is not None and generation.account.prefill_worker is None
        assert "KV of prefill-1 cannot be read" in generation.account.route_reason
        assert ("layer groups" if other is None else "draft") in generation.account.route_reason

    asyncio.run(serve())
