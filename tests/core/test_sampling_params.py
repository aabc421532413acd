"""Every range refuses what is outside of it, naming the field; vLLM's and OpenAI's ways to write things are taken."""

from __future__ import annotations

import math

import msgspec
import pytest

from eagleray.core.errors import InvalidRequest
from eagleray.core.sampling_params import MAX_CHOICES, MAX_LOGPROBS, SamplingParams

REFUSED: list[tuple[str, object]] = [
    ("temperature", -0.1), ("temperature", 100.1), ("temperature", math.nan), ("temperature", math.inf),
    ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
    ("top_k", -2),
    ("min_p", -0.1), ("min_p", 1.1),
    ("presence_penalty", -2.1), ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1), ("frequency_penalty", 2.1),
    ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", math.nan),
    ("logit_bias", {3: 100.5}), ("logit_bias", {3: -100.5}), ("logit_bias", {3: math.nan}),
    ("seed", 2**63), ("seed", -(2**63) - 1),
    ("n", 0), ("n", MAX_CHOICES + 1),
    ("max_tokens", 0), ("max_tokens", -1),
    ("min_tokens", -1), ("min_tokens", 17),
    ("logprobs", -1), ("logprobs", MAX_LOGPROBS + 1),
    ("prompt_logprobs", -1), ("prompt_logprobs", MAX_LOGPROBS + 1),
    ("stop", ["fine", ""]),
]  # fmt: skip

TAKEN: list[tuple[str, object]] = [
    ("temperature", 0.0), ("temperature", 100.0), ("top_p", 1.0), ("top_p", 1e-9), ("top_k", -1), ("top_k", 0),
    ("min_p", 0.0), ("min_p", 1.0), ("presence_penalty", -2.0), ("frequency_penalty", 2.0),
    ("repetition_penalty", 100.0), ("logit_bias", {3: -100.0, 4: 100.0}), ("logit_bias", {}), ("seed", 2**63 - 1),
    ("seed", -(2**63)), ("seed", 0), ("n", 1), ("n", MAX_CHOICES), ("max_tokens", 1), ("min_tokens", 16),
    ("logprobs", 0), ("logprobs", MAX_LOGPROBS), ("prompt_logprobs", 0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_a_value_out_of_range_is_refused_naming_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=field) as refusal:
        SamplingParams(**{field: value})
    assert refusal.value.param == field


@pytest.mark.parametrize(("field", "value"), TAKEN)
def test_the_ends_of_a_range_are_taken(field: str, value: object) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_without_an_output_limit_any_minimum_fits() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=1000).min_tokens == 1000


@pytest.mark.parametrize(
    ("written", "meant"), [(None, ()), ("end", ("end",)), (["a", "b"], ("a", "b")), ((), ()), (("a",), ("a",))]
)
def test_stop_strings_may_be_written_as_vllm_users_do(written: object, meant: tuple[str, ...]) -> None:
    assert SamplingParams(stop=written).stop == meant


@pytest.mark.parametrize(("written", "meant"), [(None, ()), ([1, 2], (1, 2)), ((3,), (3,))])
def test_stop_token_ids_may_be_a_list_or_none(written: object, meant: tuple[int, ...]) -> None:
    assert SamplingParams(stop_token_ids=written).stop_token_ids == meant


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0.0, True), (0, True), (1e-38, True), (1e-4, False), (1.0, False)]
)
def test_a_temperature_of_nearly_zero_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).is_greedy is greedy


def test_parameters_arrive_as_they_were_sent() -> None:
    sent = SamplingParams(n=2, stop=["x"], stop_token_ids=[5], logit_bias={7: -100.0}, seed=1, max_tokens=None)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=SamplingParams) == sent


def test_parameters_that_arrive_out_of_range_are_refused_too() -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"temperature": -1.0}), type=SamplingParams)


@pytest.mark.parametrize("stop", [["x"] * 65, ["x" * 1025]])
def test_stop_strings_that_would_hold_up_other_requests_are_refused(stop: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="stop: at most"):
        SamplingParams(stop=stop)
