from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models

from eagleray.text.detokenizer import IncrementalDetokenizer
from eagleray.text.fake import FIRST_BYTE_ID, byte_tokenizer
from eagleray.text.tokenizer import Tokenizer


def pushed(detokenizer: IncrementalDetokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pushes_add_up_to_the_decoded_output(data: st.DataObject, tokenizer: Tokenizer):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    assert "".join(pushed(IncrementalDetokenizer(tokenizer, [], skip), ids)) == tokenizer.decode(ids, skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30), cut=st.floats(0, 1))
def test_output_continues_the_prompt_exactly(text: str, cut: float, tokenizer: Tokenizer):
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompt, output = ids[: int(len(ids) * cut)], ids[int(len(ids) * cut) :]
    before, after = tokenizer.decode(prompt), tokenizer.decode(ids)
    if after.startswith(before):  # the prompt does not end within a character
        assert before + "".join(pushed(IncrementalDetokenizer(tokenizer, prompt), output)) == after


def test_a_character_comes_whole_with_its_last_byte():
    tokenizer = byte_tokenizer()
    ids = [FIRST_BYTE_ID + byte for byte in "é👩".encode()]
    assert pushed(IncrementalDetokenizer(tokenizer, []), ids) == ["", "é", "", "", "", "👩", ""]


def test_a_character_that_never_completes_is_replaced_at_the_end_only():
    tokenizer = byte_tokenizer()
    ids = [FIRST_BYTE_ID + byte for byte in "東".encode()[:2]]
    assert pushed(IncrementalDetokenizer(tokenizer, []), ids) == ["", "", "\ufffd"]


def test_the_prefix_space_is_dropped_only_at_the_start_of_a_text(sentencepiece: Tokenizer):
    ids = sentencepiece.encode("the sea", add_special_tokens=False)
    bos = sentencepiece.bos_token_id
    assert "".join(pushed(IncrementalDetokenizer(sentencepiece, [bos]), ids)) == "the sea"
    assert "".join(pushed(IncrementalDetokenizer(sentencepiece, [bos, ids[0]]), ids)) == " the sea"


def test_a_metaspace_decoder_drops_the_spaces_of_the_first_token():
    backend = BackendTokenizer(models.BPE(vocab={"▁a": 0, "b": 1, "▁▁": 2}, merges=[]))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    for ids in ([0, 0, 1], [2, 0], [1, 2, 0]):
        assert "".join(pushed(IncrementalDetokenizer(tokenizer, []), ids)) == backend.decode(ids)
