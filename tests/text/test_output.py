from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from eagleray.core.sampling_params import SamplingParams
from eagleray.text.fake import byte_tokenizer
from eagleray.text.output import OutputText, TokenText
from eagleray.text.tokenizer import Tokenizer

STOPS = st.lists(st.text("ae 東京é<>", min_size=1, max_size=3), max_size=3)


def outcome(output: OutputText, token_ids: list[int]) -> list[TokenText]:
    texts = []
    for token_id in token_ids:
        texts.append(output.push(token_id))
        if texts[-1].stop_reason is not None:
            break
    return [*texts, TokenText(output.finish())]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), text=st.text("ae 東京é<>👩\u0301", max_size=25), stops=STOPS)
def test_replay_at_any_token_goes_on_as_if_undisturbed(data: st.DataObject, text: str, stops: list[str], tokenizer):
    sampling = SamplingParams(stop=tuple(stops), min_tokens=data.draw(st.integers(0, 3)))
    prompt, ids = tokenizer.encode("the "), tokenizer.encode(text, add_special_tokens=False)
    whole = outcome(OutputText(tokenizer, sampling, prompt), ids)
    at = data.draw(st.integers(0, max(len(whole) - 2, 0)))
    resumed = OutputText(tokenizer, sampling, prompt)
    resumed.replay(ids[:at])
    assert outcome(resumed, ids[at:]) == whole[at:]


@settings(max_examples=100, deadline=None)
@given(text=st.text("ae 東京é<>👩\u0301", max_size=25), stops=STOPS)
def test_the_released_text_is_the_text_up_to_the_stop_string(text: str, stops: list[str]):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = outcome(OutputText(tokenizer, SamplingParams(stop=tuple(stops)), []), ids)
    released, stop = "".join(part.text for part in texts), texts[-2].stop_reason if len(texts) > 1 else None
    if stop is None:
        assert released == text and not any(stop in text for stop in stops)
    else:
        assert text.startswith(released + stop) and not any(stop in released for stop in stops)


def test_a_stop_string_before_min_tokens_does_not_count():
    tokenizer = byte_tokenizer()
    output = OutputText(tokenizer, SamplingParams(stop=("b",), min_tokens=4), [])
    texts = [output.push(token_id) for token_id in tokenizer.encode("abab")]
    assert [part.text for part in texts] == ["a", "b", "a", ""]
    assert [part.stop_reason for part in texts] == [None, None, None, "b"]


def test_what_is_held_back_comes_at_the_end(byte_level: Tokenizer):
    output = OutputText(byte_level, SamplingParams(stop=("END",)), [])
    assert "".join(output.push(token_id).text for token_id in byte_level.encode("an EN")) == "an "
    assert output.finish() == "EN"


def test_the_stop_string_is_kept_when_asked_for():
    tokenizer = byte_tokenizer()
    output = OutputText(tokenizer, SamplingParams(stop=("b.",), include_stop_str_in_output=True), [])
    assert "".join(output.push(token_id).text for token_id in tokenizer.encode("ab.")) == "ab."
    assert output.finish() == ""
