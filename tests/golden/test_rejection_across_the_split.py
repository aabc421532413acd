"""Verified by rejection, greedy answers are those without guesses wherever they are computed, and guesses come true for
all. Of drawn answers only the distribution is the same."""

from __future__ import annotations

import pytest
from served_requests import NUM_NEW_TOKENS, Checkpoints, Records, Tokens, save_checkpoints, specs
from ways_to_serve import WAYS, running_engine, tokens_of


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return save_checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(checkpoints: Checkpoints) -> Tokens:
    with running_engine(checkpoints, None, Records()) as engine:
        return tokens_of(engine, specs())


@pytest.mark.parametrize("method", ["eagle3", "draft_model", "early_exit"])
@pytest.mark.parametrize("way", ["preempted by recompute, with a cache", "preempted by swap", "split over tcp"])
def test_greedy_answers_by_rejection_are_exact_however_they_are_served(
    checkpoints: Checkpoints, plain: Tokens, method: str, way: str
) -> None:
    served = WAYS[way](checkpoints, {**checkpoints.speculation[f"{method}, chain"], "verification": "rejection"})
    greedy = [spec.request_id for spec in specs() if spec.sampling.is_greedy]
    assert {index: served.tokens[index] for index in greedy} == {index: plain[index] for index in greedy}
    assert {len(tokens) for tokens in served.tokens.values()} == {NUM_NEW_TOKENS}
    assert min(served.records.num_accepted(spec.request_id) for spec in specs()) > 0
    assert served.records.mean_accepted > 1.5
